"""The loss of Progressive Distillation (Salimans & Ho 2022, Algorithm 2), for any training loop.

    table = build_step_table(Cosine(), steps=4, prediction="v", weighting="truncated_snr")
    loss = distillation_loss(student, teacher, x, table).mean()

A model is anything with `model(z, phi, cond) -> output`: z [N, C, ...] float, phi [N] float32 in radians. Where it has an attribute
`prediction`, that must be the table's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdfast.diffusion import Model, StepTable, check_cond, check_model, check_output, check_tensor, prediction_of
from pdfast_kernels import ddim_step, ddim_step_weighted_loss
from pdfast_kernels.index import in_range, rows_of


def as_it_is(function: Callable) -> Callable:
    return function


def check_predictions(table: StepTable, **models: Model) -> None:
    """ValueError for a model that says it predicts something else than the networks that the table is for."""
    for name, model in models.items():
        said = prediction_of(model)
        if said not in (None, table.prediction):
            raise ValueError(
                f"the {name} predicts {said!r}, but the table is for networks that predict {table.prediction!r}"
            )


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
        first = check_output("the teacher", teacher(z, phi.float(), cond), z, table.prediction)
        z_mid = run(ddim_step)(z, first, table.ddim_z, table.ddim_output, index)
        second = teacher(z_mid, rows_of(table.phi_mid, index).float(), cond)
        return first, check_output("the teacher", second, z, table.prediction)


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
        check_output("the student", output, z, table.prediction),
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

    x: images in about [-1, 1], float [N, C, ...]. table: of the student's number of steps, on x's device. k: step indices in
    1..steps, int64 [N], and eps: noise like x; both drawn, with the generator, where not given. student and teacher: of one
    prediction, that of the table. cond: handed to both; a tensor begins with N. z and the target are float32, or float64 where x
    is, whatever the dtypes of x, eps and the outputs are. TypeError for a wrong dtype, ValueError for a wrong shape, device or
    prediction, and for a k out of range (on a GPU, where asking would be a wait, the losses of those images are NaN).
    """
    check_tensor("x", x)
    if not isinstance(table, StepTable):
        raise TypeError(f"table is a {type(table).__name__}: give what build_step_table returns")
    check_model("student", student)
    check_model("teacher", teacher)
    if not x.is_floating_point():
        raise TypeError(f"images of dtype {x.dtype}: make them floats in [-1, 1], as x.float() / 127.5 - 1")
    check_predictions(table, student=student, teacher=teacher)
    check_cond(cond, len(x))
    if table.phi.device != x.device:
        raise ValueError(f"the table is on {table.phi.device}, x is on {x.device}: give table.to(x.device)")
    for name, given in (("k", k), ("eps", eps)):
        if given is not None:
            check_tensor(name, given)
    if k is not None and k.dtype != torch.int64:
        raise TypeError(f"k of dtype {k.dtype}: give step indices as int64")
    if k is not None and k.shape != (len(x),):
        raise ValueError(f"k has shape {tuple(k.shape)}: one step index for each of the {len(x)} images is due")
    if eps is not None and not eps.is_floating_point():
        raise TypeError(f"eps of dtype {eps.dtype}: give noise as floats")
    if eps is not None and eps.shape != x.shape:
        raise ValueError(f"eps has shape {tuple(eps.shape)}, x has {tuple(x.shape)}: noise is like x")
    steps = len(table.phi)
    if k is None:
        k = torch.randint(1, steps + 1, (len(x),), device=x.device, generator=generator)
    if eps is None:
        eps = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    index = in_range("distillation_loss", "k", k, 1, steps + 1) - 1
    phi = rows_of(table.phi, index)
    column = (-1, *(1,) * (x.dim() - 1))
    z = torch.cos(phi).view(column) * x + torch.sin(phi).view(column) * eps
    first, second = teacher_steps(teacher, z, phi, table, index, cond)
    return student_losses(student(z, phi.float(), cond), z, first, second, table, index)
