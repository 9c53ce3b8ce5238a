"""More operations in plain PyTorch, as in `reference`."""

import torch
from torch import Tensor

from pdfast_kernels import philox, reference


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
    columns = (target_z, target_output, target_output_mid, output_coefficient, weight)
    rows = (reference._rows(column, index) for column in columns)
    return reference.ddim_step_weighted_loss(output, z, teacher_output, teacher_output_mid, *rows)


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
    a, b, d, c, weight = (reference._rows(column, index) for column in columns)
    target = reference.ddim_step(z, teacher_output, a, b) + reference._combine(teacher_output_mid, d)
    error = reference._combine(output, c) - target
    slope = c * (2 * grad_scale / max(z[:1].numel(), 1) * weight)[:, None]
    grad = torch.cat([reference._like(slope[:, p], error) * error for p in range(c.shape[1])], dim=1)
    return weight * error.square().flatten(1).mean(1), grad.to(output.dtype)


def diffuse(
    images: Tensor,
    phi: Tensor,
    key: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """z = cos(phi) x + sin(phi) eps, computed in float32, or in float64 for that dtype."""
    n, height, width, channels = images.shape
    noise = philox.normals_from_key(key, index, height * width * channels)
    noise = noise.view(n, height, width, channels).permute(0, 3, 1, 2)
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    z = reference.diffuse(images, phi.to(inside), noise.to(inside), flip)
    return z.to(dtype, memory_format=torch.channels_last)


@torch.no_grad()
def adam_ema(
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor] | None,
    gradients: list[Tensor],
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
    gradients = torch._foreach_mul(gradients, clip)
    torch._foreach_lerp_(exp_avgs, gradients, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - betas[1])
    roots = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(roots, (1 - betas[1] ** step) ** 0.5)
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(parameters, 1 - learning_rate * weight_decay)
    torch._foreach_addcdiv_(parameters, exp_avgs, roots, -learning_rate / (1 - betas[0] ** step))
    if averages is not None:
        torch._foreach_lerp_(averages, parameters, average_rate)
