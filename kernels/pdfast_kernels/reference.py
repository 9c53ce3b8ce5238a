"""The operations in plain PyTorch: the path on a CPU, and what every faster implementation is compared with.

The public functions, in the modules of their names, say what the arguments are and check them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from pdfast_kernels import philox
from pdfast_kernels.dispatch import compute_dtype
from pdfast_kernels.index import rows_of
from pdfast_kernels.layout import is_channels_last


def _like(coefficient: Tensor, z: Tensor) -> Tensor:
    return coefficient.view(-1, *(1,) * (z.dim() - 1))


def _combine(output: Tensor, coefficient: Tensor) -> Tensor:
    """sum_p coefficient[:, p] * output_p: [N, P*C, ...] and [N, P] -> [N, C, ...]."""
    parts = output.chunk(coefficient.shape[1], dim=1)
    return sum(_like(coefficient[:, p], part) * part for p, part in enumerate(parts))  # type: ignore[return-value]


def mix(images: Tensor, phi: Tensor, noise: Tensor, flip: Tensor | None) -> Tensor:
    """cos(phi) x + sin(phi) noise, of uint8 [N, H, W, C] and in the dtype of noise [N, C, H, W]."""
    x = images.permute(0, 3, 1, 2).to(noise.dtype) / 127.5 - 1
    if flip is not None:
        x = torch.where(_like(flip, x), x.flip(-1), x)
    return _like(torch.cos(phi), x) * x + _like(torch.sin(phi), x) * noise


def diffuse(
    images: Tensor,
    phi: Tensor,
    key: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    # In float32; in float64 for that dtype. `diffuse` has asked the indices where it can.
    n, height, width, channels = images.shape
    noise = philox.normals_from_key(key, index, height * width * channels)
    noise = noise.view(n, height, width, channels).permute(0, 3, 1, 2)
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    phi = torch.where((index >= 0) & (index < 1 << 32), phi, torch.nan)
    z = mix(images, phi.to(inside), noise.to(inside), flip)
    return z.to(dtype, memory_format=torch.channels_last)


def _rows(column: Tensor, index: Tensor | None) -> Tensor:
    """The rows of a table, in float32 at least, as in the kernels: with them all that follows is."""
    rows = rows_of(column, index)
    return rows.float() if rows.dtype.itemsize < 4 else rows


def ddim_step(
    z: Tensor, output: Tensor, z_coefficient: Tensor, output_coefficient: Tensor, index: Tensor | None = None
) -> Tensor:
    return _step(z, output, _rows(z_coefficient, index), _rows(output_coefficient, index)).to(z.dtype)


def _step(z: Tensor, output: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """In the dtype of the coefficients, which a z of 16 bits is not."""
    return _like(a, z) * z + _combine(output, b)


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
    index: Tensor | None = None,
) -> Tensor:
    target = _step(z, teacher_output, _rows(target_z, index), _rows(target_output, index))
    target = target + _combine(teacher_output_mid, _rows(target_output_mid, index))
    return weighted_loss(output, target, _rows(output_coefficient, index), _rows(weight, index))


def ddim_step_weighted_loss_and_grad(
    output: Tensor,
    z: Tensor,
    teacher_output: Tensor,
    teacher_output_mid: Tensor,
    target_z: Tensor,
    target_output: Tensor,
    target_output_mid: Tensor,
    output_coefficient: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    *,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    columns = (target_z, target_output, target_output_mid, output_coefficient, weight)
    a, b, d, c, weight = (_rows(column, index) for column in columns)
    target = _step(z, teacher_output, a, b) + _combine(teacher_output_mid, d)
    error = _combine(output, c) - target
    slope = c * (2 * grad_scale / max(z[:1].numel(), 1) * weight)[:, None]
    grad = torch.cat([_like(slope[:, p], error) * error for p in range(c.shape[1])], dim=1)
    return weight * error.square().flatten(1).mean(1), grad.to(output.dtype)


def _normalise(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
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
    y = _normalise(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(_like_channels(shift, x), y, 1 + _like_channels(scale, x))
    elif scale is not None:
        y = y * (1 + _like_channels(scale, x))
    elif shift is not None:
        y = y + _like_channels(shift, x)
    return (F.silu(y) if silu else y).to(x.dtype)


def _like_channels(film: Tensor, x: Tensor) -> Tensor:
    return film.reshape(*film.shape, *(1,) * (x.dim() - 2))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale)


def group_norm_attention(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    n, c, h, w = x.shape
    normalised = _normalise(x, num_groups, norm_weight, norm_bias, eps)
    positions = normalised.permute(0, 2, 3, 1).reshape(n, h * w, c)
    qkv = F.linear(positions, qkv_weight.to(x.dtype), qkv_bias.to(x.dtype)).view(n, h * w, 3, num_heads, c // num_heads)
    attended = attention_packed(qkv).view(n, h * w, c)
    branch = F.linear(attended, proj_weight.to(x.dtype), proj_bias.to(x.dtype))
    return x + branch.view(n, h, w, c).permute(0, 3, 1, 2)


@torch.no_grad()
def adam_ema(
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor] | None,
    gradients: Sequence[Tensor],
    scalars: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """In place. scalars: learning rate, step, clip factor, average rate, skip flag."""
    learning_rate, step, clip, average_rate, skip = scalars.tolist()
    if skip != 0 or not parameters:
        return
    gradients = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
    if clip != 1:
        gradients = list(torch._foreach_mul(gradients, clip))
    adamw(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(step - 1, device=p.device, dtype=torch.float32) for p in parameters],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if averages is not None:
        torch._foreach_lerp_(averages, parameters, average_rate)
