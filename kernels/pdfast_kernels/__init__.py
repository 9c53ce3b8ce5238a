"""pdfast_kernels: the operations of diffusion models and of their distillation, fused. Imports torch and triton only."""

from pdfast_kernels.integrate.accelerate import Report, accelerate, restore
from pdfast_kernels.ops.adam_ema.adam_ema import AdamEma, Scalar
from pdfast_kernels.ops.attention.attention import attention, attention_packed
from pdfast_kernels.ops.ddim_step.ddim_step import ddim_step
from pdfast_kernels.ops.ddim_step_weighted_loss.ddim_step_weighted_loss import (
    ddim_step_weighted_loss,
    ddim_step_weighted_loss_and_grad,
)
from pdfast_kernels.ops.ddim_step_weighted_loss.reference import weighted_loss
from pdfast_kernels.ops.diffuse.diffuse import diffuse, noise_key
from pdfast_kernels.ops.fused_adamw.fused_adamw import FusedAdamW
from pdfast_kernels.ops.group_norm.group_norm import group_norm
from pdfast_kernels.ops.group_norm_attention.group_norm_attention import group_norm_attention
from pdfast_kernels.runtime.dispatch import use

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
