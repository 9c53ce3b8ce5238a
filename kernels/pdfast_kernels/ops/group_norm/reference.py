"""GroupNorm in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pdfast_kernels.runtime.dispatch import compute_dtype
from pdfast_kernels.runtime.layout import is_channels_last


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    # In PyTorch's own dtypes where all are one.
    y = normalise(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(_like_channels(shift, x), y, 1 + _like_channels(scale, x))
    elif scale is not None:
        y = y * (1 + _like_channels(scale, x))
    elif shift is not None:
        y = y + _like_channels(shift, x)
    return (F.silu(y) if silu else y).to(x.dtype)


def normalise(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        # PyTorch's takes float32 parameters of half-precision images, on a CPU alone.
        inside = compute_dtype(x)
        weight, bias = (None if p is None else p.to(inside) for p in (weight, bias))
        wide = x if x.device.type == "cpu" else x.to(inside)
        return _normalise_alike(wide, num_groups, weight, bias, eps).to(x.dtype)
    return _normalise_alike(x, num_groups, weight, bias, eps)


def _normalise_alike(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wanted = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias))
    if wanted and not x.requires_grad and x.device.type == "cpu" and is_channels_last(x):
        # PyTorch's channels-last backward on a CPU ends the process where dx is not asked for (seen in 2.13).
        y = F.group_norm(x.contiguous(), num_groups, weight, bias, eps)
        return y.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, num_groups, weight, bias, eps)


def _like_channels(film: Tensor, x: Tensor) -> Tensor:
    return film.reshape(*film.shape, *(1,) * (x.dim() - 2))
