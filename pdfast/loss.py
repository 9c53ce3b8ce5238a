"""The loss of Progressive Distillation (Salimans & Ho 2022, Algorithm 2), for any training loop.

    table = build_step_table(Cosine(), steps=4, prediction="v", weighting="truncated_snr")
    loss = distillation_loss(student, teacher, x, table).mean()

A model is anything with `model(z, phi, cond) -> output`: z [N, C, ...] float, phi [N] float32 in radians. Where it has an attribute
`prediction`, that must be the table's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pdfast.diffusion import Model, StepTable, check_cond, check_model, check_output, check_tensor, prediction_of
from pdfast_kernels import ddim_step, ddim_step_weighted_loss
from pdfast_kernels.runtime.index import in_range, rows_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


def identity(function: Callable) -> Callable:
    return function


def check_predictions(table: StepTable, **models: Model) -> None:
    """Raise a ValueError for a model that says it predicts something else than the networks that the table is for."""
    for name, model in models.items():
        said = prediction_of(model)
        if said not in (None, table.prediction):
            raise ValueError(
                f"the {name} predicts {said!r}, but the table is for networks that predict {table.prediction!r}"
            )


def teacher_outputs(
    teacher: Model,
    z: Float[Tensor, "n c *s"],
    table: StepTable,
    index: Int64[Tensor, "n"],
    cond: Any = None,
    run: Callable[[Callable], Callable] = identity,
    average: Model | None = None,
) -> tuple[Float[Tensor, "n c *s"], Float[Tensor, "n pc *s"], Float[Tensor, "n pc *s"]]:
    """Return what the target is a combination of: z and the last two outputs, [N, P*C, ...]; no gradient.

    With more than two parts z's place is taken by the sum of all that comes before the last two, in z's dtype. index: rows of the
    table, k - 1, int64 [N]. run: what compiles a function, for the steps in between. average: the student's own average, which
    takes the last part where the table says so.
    """
    step, start, outputs = run(ddim_step), z, []
    with torch.no_grad():
        for j, phi in enumerate(table.angles[:-1]):
            last = j == table.parts - 1
            model = average if last and table.last_by_average and average is not None else teacher
            name = "the average" if model is average else "the teacher"
            outputs.append(check_output(name, model(z, rows_of(phi, index).float(), cond), z, table.prediction))
            if not last:
                z = step(z, outputs[-1], table.step_z[j], table.step_output[j], index)
            if j < table.parts - 2:
                start = step(start, outputs[-1], _coefficient_of_start(table, j), table.target_output[j], index)
        first, second = outputs[-2:]
        if (
            table.last_by_average
        ):  # where the teacher's step ends a segment nothing is left to do, whatever is said there
            weight = rows_of(table.target_output[-1], index).abs().sum(1)
            second = torch.where((weight == 0).view(-1, *(1,) * (second.dim() - 1)), 0, second)
        return start, first, second


def _coefficient_of_start(table: StepTable, summed: int) -> Tensor:
    """Return what z, or the sum with `summed` outputs that took its place, is multiplied by: float [R]."""
    return table.target_z if summed == 0 else torch.ones_like(table.target_z)


def combined_target(
    start: Float[Tensor, "n c *s"],
    first: Float[Tensor, "n pc *s"],
    second: Float[Tensor, "n pc *s"],
    table: StepTable,
    index: Int64[Tensor, "n"],
) -> Float[Tensor, "n c *s"]:
    """Return the target that `student_losses` compares with, of what `teacher_outputs` gave: a point of the circle, float32 [N, C, ...]."""
    before = ddim_step(start, first, _coefficient_of_start(table, table.parts - 2), table.target_output[-2], index)
    return ddim_step(before, second, torch.ones_like(table.target_z), table.target_output[-1], index)


def student_losses(
    output: Float[Tensor, "n pc *s"],
    start: Float[Tensor, "n c *s"],
    first: Float[Tensor, "n pc *s"],
    second: Float[Tensor, "n pc *s"],
    table: StepTable,
    index: Int64[Tensor, "n"],
    run: Callable[[Callable], Callable] = identity,
    huber: float = 0.0,
) -> Float[Tensor, "n"]:
    """Return the weighted squared error of the student's output from what `teacher_outputs` gave, or with a `huber` above 0 its
    pseudo-Huber form, a mean over all but N: float32 [N]."""
    return run(ddim_step_weighted_loss)(
        check_output("the student", output, start, table.prediction),
        start,
        first,
        second,
        _coefficient_of_start(table, table.parts - 2),
        *table.target_output[-2:],
        table.output,
        table.weight,
        index,
        huber,
    )


def distillation_loss(
    student: Model,
    teacher: Model,
    x: Float[Tensor, "n c *s"],
    table: StepTable,
    *,
    cond: Any = None,
    k: Int64[Tensor, "n"] | None = None,
    eps: Float[Tensor, "n c *s"] | None = None,
    generator: torch.Generator | None = None,
    average: Model | None = None,
    huber: float = 0.0,
) -> Float[Tensor, "n"]:
    """Return the loss of each image, float32 [N], with a gradient to the student alone.

    x: images in about [-1, 1], float [N, C, ...]. table: of the student's number of steps, on x's device. k: rows of the table, in
    1..len(table), int64 [N], and eps: noise like x; both drawn, with the generator, where not given. student and teacher: of one
    prediction, that of the table. average: the student's own average, for a table whose last part it takes. huber: weighted errors
    above it count linearly, not squared (pseudo-Huber); 0 for none that do. cond: a tree of tensors
    that begin with N, handed to all. z and the target are float32, or float64 where x
    is, whatever the dtypes of x, eps and the outputs are. TypeError for a wrong dtype, ValueError for a wrong shape, device or
    prediction, and for a k out of range (on a GPU, where asking would be a wait, the losses of those images are NaN).
    """
    check_tensor("x", x)
    if not isinstance(table, StepTable):
        raise TypeError(f"table is a {type(table).__name__}: give what build_step_table returns")
    models = {"student": student, "teacher": teacher} | ({} if average is None else {"average": average})
    for name, model in models.items():
        check_model(name, model)
    if not x.is_floating_point():
        raise TypeError(f"images of dtype {x.dtype}: make them floats in [-1, 1], as x.float() / 127.5 - 1")
    if table.parts < 2:
        raise ValueError("table: its ends are known, no teacher leads there; give what build_step_table returns")
    if table.last_by_average != (average is not None):
        raise ValueError(
            "average: this table's last part is taken by the student's average; give it"
            if table.last_by_average
            else "average: no part of this table is taken by the student's average; leave it out"
        )
    check_predictions(table, **models)
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
    if k is None:
        k = torch.randint(1, len(table) + 1, (len(x),), device=x.device, generator=generator)
    if eps is None:
        eps = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    index = in_range("distillation_loss", "k", k, 1, len(table) + 1) - 1
    phi = rows_of(table.phi, index)
    column = (-1, *(1,) * (x.dim() - 1))
    z = torch.cos(phi).view(column) * x + torch.sin(phi).view(column) * eps
    start, first, second = teacher_outputs(teacher, z, table, index, cond, average=average)
    return student_losses(student(z, phi.float(), cond), start, first, second, table, index, huber=huber)
