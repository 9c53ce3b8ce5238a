"""pdfast_kernels: the operations of diffusion distillation, usable without pdfast."""

from pdfast_kernels.ddim_step import ddim_step
from pdfast_kernels.dispatch import use
from pdfast_kernels.reference import ddim_step_weighted_loss, diffuse, weighted_loss

__all__ = ["ddim_step", "ddim_step_weighted_loss", "diffuse", "use", "weighted_loss"]
