"""pdfast_kernels: the operations of diffusion models and of their distillation, fused. Imports torch and triton only."""

from pdfast_kernels.accelerate import Report, accelerate, restore
from pdfast_kernels.adam_ema import AdamEma, Scalar
from pdfast_kernels.attention import attention, attention_packed
from pdfast_kernels.ddim_step import ddim_step
from pdfast_kernels.ddim_step_weighted_loss import ddim_step_weighted_loss, ddim_step_weighted_loss_and_grad
from pdfast_kernels.diffuse import diffuse, noise_key
from pdfast_kernels.dispatch import use
from pdfast_kernels.fused_adamw import FusedAdamW
from pdfast_kernels.group_norm import group_norm
from pdfast_kernels.group_norm_attention import group_norm_attention
from pdfast_kernels.reference import weighted_loss

__all__ = [
    "AdamEma",
    "FusedAdamW",
    "Report",
    "Scalar",
    "accelerate",
    "attention",
    "attention_packed",
    "ddim_step",
    "ddim_step_weighted_loss",
    "ddim_step_weighted_loss_and_grad",
    "diffuse",
    "group_norm",
    "group_norm_attention",
    "noise_key",
    "restore",
    "use",
    "weighted_loss",
]
