"""The operations in plain PyTorch, by name: the path on a CPU, and what every faster implementation is compared with.

The public functions, of the same names, say what the arguments are and check them.
"""

from pdfast_kernels.ops.adam_ema.reference import adam_ema
from pdfast_kernels.ops.attention.reference import attention, attention_packed
from pdfast_kernels.ops.ddim_step.reference import ddim_step
from pdfast_kernels.ops.ddim_step_weighted_loss.reference import (
    ddim_step_weighted_loss,
    ddim_step_weighted_loss_and_grad,
    weighted_loss,
)
from pdfast_kernels.ops.diffuse.reference import diffuse, mix
from pdfast_kernels.ops.group_norm.reference import group_norm
from pdfast_kernels.ops.group_norm_attention.reference import group_norm_attention

__all__ = [
    "adam_ema",
    "attention",
    "attention_packed",
    "ddim_step",
    "ddim_step_weighted_loss",
    "ddim_step_weighted_loss_and_grad",
    "diffuse",
    "group_norm",
    "group_norm_attention",
    "mix",
    "weighted_loss",
]
