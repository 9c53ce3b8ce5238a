"""The loss of a DDIM step in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

import torch
from torch import Tensor

from pdfast_kernels.ops.columns import combine, like, table_rows
from pdfast_kernels.ops.ddim_step.reference import step


def weighted_loss(
    output: Tensor, target: Tensor, output_coefficient: Tensor, weight: Tensor, huber: float = 0.0
) -> Tensor:
    """weight |sum_p c_p o_p - target|^2, averaged over each sample's elements: float [N].

    huber: for a value h above 0, the pseudo-Huber form of each element's weighted square s, 2 h (sqrt(s + h^2) - h): s where it is
    far below h^2, 2 h sqrt(s) far above.
    """
    return _losses(combine(output, output_coefficient) - target, weight, huber)


def _losses(error: Tensor, weight: Tensor, huber: float) -> Tensor:
    if huber == 0:
        return weight * error.square().flatten(1).mean(1)
    squared = like(weight, error) * error.square()
    return (2 * huber * squared / ((squared + huber**2).sqrt() + huber)).flatten(1).mean(1)


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
    huber: float = 0.0,
) -> Tensor:
    target = step(z, teacher_output, table_rows(target_z, index), table_rows(target_output, index))
    target = target + combine(teacher_output_mid, table_rows(target_output_mid, index))
    return weighted_loss(output, target, table_rows(output_coefficient, index), table_rows(weight, index), huber)


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
    huber: float = 0.0,
) -> tuple[Tensor, Tensor]:
    columns = (target_z, target_output, target_output_mid, output_coefficient, weight)
    a, b, d, c, weight = (table_rows(column, index) for column in columns)
    target = step(z, teacher_output, a, b) + combine(teacher_output_mid, d)
    error = combine(output, c) - target
    slope = c * (2 * grad_scale / max(z[:1].numel(), 1) * weight)[:, None]
    grown = error if huber == 0 else error * huber / (like(weight, error) * error.square() + huber**2).sqrt()
    grad = torch.cat([like(slope[:, p], error) * grown for p in range(c.shape[1])], dim=1)
    return _losses(error, weight, huber), grad.to(output.dtype)
