"""The operations in plain PyTorch: the path on a CPU, and what every faster implementation is compared with.

All of them are linear in the tensors; what depends on time comes in as per-sample coefficients, gathered from a step
table by the caller. z is [N, C, ...] float; an output is [N, P*C, ...] with P = 1, or P = 2 for a network that predicts
x and eps (x first). Coefficients are [N], those of an output [N, P].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _like(coefficient: Tensor, z: Tensor) -> Tensor:
    return coefficient.view(-1, *(1,) * (z.dim() - 1))


def _combine(output: Tensor, coefficient: Tensor) -> Tensor:
    """sum_p coefficient[:, p] * output_p: [N, P*C, ...] and [N, P] -> [N, C, ...]."""
    parts = output.chunk(coefficient.shape[1], dim=1)
    return sum(_like(coefficient[:, p], part) * part for p, part in enumerate(parts))


def diffuse(images: Tensor, phi: Tensor, noise: Tensor, flip: Tensor | None = None) -> Tensor:
    """z = cos(phi) x + sin(phi) noise, with x the images in [-1, 1].

    images: uint8 [N, H, W, C]. phi: float [N], radians. noise: float [N, C, H, W]. flip: bool [N], left-right.
    Returns [N, C, H, W] with channels-last strides, in the noise's dtype.
    """
    x = images.permute(0, 3, 1, 2).to(noise.dtype) / 127.5 - 1
    if flip is not None:
        x = torch.where(_like(flip, x), x.flip(-1), x)
    return _like(torch.cos(phi), x) * x + _like(torch.sin(phi), x) * noise


def _rows(coefficient: Tensor, index: Tensor | None) -> Tensor:
    return coefficient if index is None else coefficient[index]


def ddim_step(
    z: Tensor, output: Tensor, z_coefficient: Tensor, output_coefficient: Tensor, index: Tensor | None = None
) -> Tensor:
    a, b = _rows(z_coefficient, index), _rows(output_coefficient, index)
    return (_like(a, z) * z + _combine(output, b)).to(z.dtype)


def weighted_loss(output: Tensor, target: Tensor, output_coefficient: Tensor, weight: Tensor) -> Tensor:
    """weight |sum_p c_p o_p - target|^2, averaged over each sample's elements: float [N]."""
    error = _combine(output, output_coefficient) - target
    return weight * error.square().flatten(1).mean(1)


def ddim_step_weighted_loss(
    output: Tensor,
    z: Tensor,
    teacher_output: Tensor,
    teacher_output_mid: Tensor,
    target_z: Tensor,
    target_output: Tensor,
    target_output_mid: Tensor,
    output_coefficient: Tensor,
    weight: Tensor,
) -> Tensor:
    """The loss of one student step that spans two DDIM steps of the teacher: float [N], a mean over C, H, W.

    output: the student's at (z, phi); teacher_output: at (z, phi); teacher_output_mid: at (z_mid, phi_mid).
    The target is linear in (z, teacher_output, teacher_output_mid), with the coefficients of the round's step table.
    """
    target = ddim_step(z, teacher_output, target_z, target_output) + _combine(teacher_output_mid, target_output_mid)
    return weighted_loss(output, target, output_coefficient, weight)


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
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _like_channels(scale, x))
    if shift is not None:
        y = y + _like_channels(shift, x)
    return F.silu(y) if silu else y


def _like_channels(film: Tensor, x: Tensor) -> Tensor:
    return film.reshape(*film.shape, *(1,) * (x.dim() - 2))
