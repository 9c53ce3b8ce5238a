"""The loss of Progressive Distillation (Salimans & Ho 2022, Algorithm 2), for any training loop.

    table = build_step_table(Cosine(), steps=4, prediction="v", weighting="truncated_snr")
    loss = distillation_loss(student, teacher, x, table).mean()

A model is anything with `model(z, phi, cond) -> output`: z [N, C, H, W] float, phi [N] float32 in radians.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdfast.diffusion import Model, StepTable
from pdfast_kernels import ddim_step, ddim_step_weighted_loss


def as_it_is(function: Callable) -> Callable:
    return function


def teacher_steps(
    teacher: Model,
    z: Tensor,
    phi: Tensor,
    table: StepTable,
    index: Tensor,
    cond: Any = None,
    run: Callable[[Callable], Callable] = as_it_is,
) -> tuple[Tensor, Tensor]:
    """The teacher's two outputs, [N, P*C, H, W], at z and where its DDIM step takes it; no gradient.

    index: rows of the table, step index - 1, int64 [N]. run: what compiles a function, for the step in between.
    """
    with torch.no_grad():
        first = teacher(z, phi, cond)
        z_mid = run(ddim_step)(z, first, table.ddim_z, table.ddim_output, index)
        return first, teacher(z_mid, table.phi_mid[index], cond)


def student_losses(
    output: Tensor,
    z: Tensor,
    first: Tensor,
    second: Tensor,
    table: StepTable,
    index: Tensor,
    run: Callable[[Callable], Callable] = as_it_is,
) -> Tensor:
    """The weighted squared error of the student's output, a mean over C, H and W: float32 [N]."""
    return run(ddim_step_weighted_loss)(
        output,
        z,
        first,
        second,
        table.target_z,
        table.target_output,
        table.target_output_mid,
        table.output,
        table.weight,
        index,
    )


def distillation_loss(
    student: Model,
    teacher: Model,
    x: Tensor,
    table: StepTable,
    *,
    cond: Any = None,
    k: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss of each image, float32 [N], with a gradient to the student alone.

    x: images in about [-1, 1], float [N, C, H, W]. table: of the student's number of steps, on x's device. k: step indices in
    1..steps, int64 [N], and eps: noise like x; both drawn, with the generator, where not given. student and teacher: of one
    `prediction`, that of the table. TypeError for images that are not floats.
    """
    if not x.is_floating_point():
        raise TypeError(f"images of dtype {x.dtype}: make them floats in [-1, 1], as x.float() / 127.5 - 1")
    steps = len(table.phi)
    if k is None:
        k = torch.randint(1, steps + 1, (len(x),), device=x.device, generator=generator)
    if eps is None:
        eps = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    index = k - 1
    phi = table.phi[index]
    column = (-1, *(1,) * (x.dim() - 1))
    z = torch.cos(phi).view(column) * x + torch.sin(phi).view(column) * eps
    first, second = teacher_steps(teacher, z, phi, table, index, cond)
    return student_losses(student(z, phi, cond), z, first, second, table, index)
