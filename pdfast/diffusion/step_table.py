"""The step table of a round: all that depends on time, for each row that an update can draw, computed once in float64.

A row says where the student's one step begins, phi_0 = phi, where it must land, phi_m = phi_next, and which m parts lead there.
In Progressive Distillation (Algorithm 2 of Salimans & Ho 2022) row k in 1..N is the student step from u = k/N to (k-1)/N, and
the parts are m = 2 DDIM steps of the teacher; by a factor m it takes m. In a table of transitive closure (Berthelot et al. 2023)
there is a row for every point of the teacher's grid: one step of the teacher, then the student's own average to the end of the
row's segment.

With o_j what the network that takes part j says at its start, the point at theta_j, and (1) of `circle` applied m times,

    A_j = sin(theta_j - phi_j) / sin(theta_j - phi_{j-1})     B_j = sin(phi_j - phi_{j-1}) / sin(theta_j - phi_{j-1})
    T_j = A_{j+1} ... A_m

the output that takes the student to the same end in one step is

    o = c_0 z + sum_j c_j o_j          c_j = sin(theta_1 - phi_0) B_j T_j / sin(phi_m - phi_0)                           (2)
                                       c_0 = sum_{j>=2} c_j sin(theta_j - theta_1) / sin(theta_1 - phi_0)

where nothing cancels. The last angle is 0 for every schedule, so that row 1 of an x-network is the teacher's last x by itself.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from pdfast.diffusion.circle import (
    Prediction,
    check_start,
    output_coefficient,
    parameterization,
    step_coefficients,
)
from pdfast.diffusion.schedules import Schedule, check_schedule
from pdfast.diffusion.weights import Weighting, natural_weight
from pdfast_kernels.runtime.index import in_range, rows_of

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64


@dataclass(frozen=True, eq=False)
class StepTable:
    """R rows: tensors [R], those that multiply a network's output [R, P], one of them for each of the m parts. The arguments of
    the linear operations in `pdfast_kernels`."""

    prediction: Prediction  # of the networks that it is for
    steps: int  # of the student
    last_by_average: bool  # the last part is the student's own average's, not the teacher's
    angles: tuple[Float[Tensor, "rows"], ...]  # m + 1: where the student and each part begin, and where all end
    step_z: tuple[Float[Tensor, "rows"], ...]  # m - 1: z = step_z z + step_output o, the parts but the last
    step_output: tuple[Float[Tensor, "rows p"], ...]
    target_z: Float[Tensor, "rows"]  # target = target_z z + sum_j target_output[j] o_j
    target_output: tuple[
        Float[Tensor, "rows p"], ...
    ]  # m; of a landing table one [R, 1], of z_end in the place of an output
    output: Float[Tensor, "rows p"]  # the student's point of the circle = output o
    weight: Float[Tensor, "rows"]  # of the squared error of that point

    def __len__(self) -> int:
        """R, the number of rows."""
        return len(self.weight)

    @property
    def phi(self) -> Float[Tensor, "rows"]:
        """Where the student's step begins, [R]."""
        return self.angles[0]

    @property
    def parts(self) -> int:
        """m: how many networks' outputs lead to the target."""
        return len(self.target_output)

    def columns(self) -> tuple[Tensor, ...]:
        """Return all of its tensors, in their order."""
        return (
            *self.angles,
            *self.step_z,
            *self.step_output,
            self.target_z,
            *self.target_output,
            self.output,
            self.weight,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> StepTable:
        """Return the table of `function` of every column."""

        def each(columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(map(function, columns))

        return StepTable(
            self.prediction,
            self.steps,
            self.last_by_average,
            each(self.angles),
            each(self.step_z),
            each(self.step_output),
            function(self.target_z),
            each(self.target_output),
            function(self.output),
            function(self.weight),
        )

    def rows(self, k: Int64[Tensor, "n"]) -> StepTable:
        """Return the rows k in 1..R, in a table of one step for each student step of its index, int64 [n]. ValueError for
        another k (on a GPU a row of NaN)."""
        index = in_range("StepTable.rows", "k", k, 1, len(self) + 1) - 1
        return self.map(lambda column: rows_of(column, index))

    def to(self, device: torch.device | str) -> StepTable:
        """Return the same table on another device."""
        return self.map(lambda column: column.to(device))


def whole_steps(steps: SupportsIndex, least: int = 1, what: str = "steps") -> int:
    """Return a number of steps, of NumPy or PyTorch too, as an int. ValueError for what is no whole number, or below `least`."""
    try:
        number = operator.index(steps)
    except TypeError:
        number = 0
    if number < least or isinstance(steps, bool):
        raise ValueError(f"the number of {what} must be a whole number, at least {least}, got {steps!r}")
    return number


def angles(schedule: Schedule, steps: SupportsIndex) -> Float64[Tensor, "angles"]:
    """Return the angles of a sampler with that many steps, from phi(1) down to exactly 0: float64 [steps + 1].

    TypeError for what is no schedule, ValueError for what is no number of steps.
    """
    check_schedule(schedule, "phi")
    steps = whole_steps(steps)
    phi = schedule.phi(torch.arange(steps, -1, -1, dtype=torch.float64, device="cpu") / steps)
    phi[-1] = 0
    return phi


def build_step_table(
    schedule: Schedule,
    steps: SupportsIndex,
    prediction: Prediction,
    weighting: Weighting,
    *,
    factor: SupportsIndex = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StepTable:
    """Return the table of a round with `steps` student steps, each `factor` steps of the teacher, in float32 or float64.

    prediction: of both networks. ValueError for eps-prediction from (almost) pure noise, and for what is unknown; TypeError for what
    is no schedule.
    """
    steps, factor = whole_steps(steps), whole_steps(factor, 2, "teacher steps in one of the student's")
    first = factor * torch.arange(1, steps + 1, device="cpu")
    grid = torch.stack([first - j for j in range(factor + 1)])
    return _build(schedule, grid, factor * steps, steps, False, prediction, weighting).map(_cast(dtype, device))


def build_closure_table(
    schedule: Schedule,
    teacher_steps: SupportsIndex,
    steps: SupportsIndex,
    prediction: Prediction,
    weighting: Weighting,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StepTable:
    """Return the table of transitive closure (TRACT; Berthelot et al. 2023) from `teacher_steps` to `steps`, which divides it.

    Row k in 1..teacher_steps begins at u = k / teacher_steps; the teacher's step ends at the point before, the student's average
    goes on to the end of the segment. Where that is the same point, its output has no weight, and it is asked at the start of the
    teacher's step. Other arguments and errors as of `build_step_table`.
    """
    steps, teacher_steps = whole_steps(steps), whole_steps(teacher_steps)
    if teacher_steps % steps:
        raise ValueError(f"teacher_steps {teacher_steps} must be a multiple of steps, {steps}")
    segment = teacher_steps // steps
    first = torch.arange(1, teacher_steps + 1, device="cpu")
    grid = torch.stack([first, first - 1, (first - 1) // segment * segment])
    table = _build(schedule, grid, teacher_steps, steps, True, prediction, weighting)
    return table.map(_cast(dtype, device))


def build_landing_table(
    schedule: Schedule,
    steps: SupportsIndex,
    prediction: Prediction,
    weighting: Weighting,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StepTable:
    """Return the table of a round with `steps` student steps whose ends are known (Luhman & Luhman 2021): m = 1, and the output that
    lands at z_end is

        o = target_z z + target_output z_end = [ sin(theta - phi) z_end - sin(theta - psi) z ] / sin(psi - phi)

    with target_output [R, 1]. Other arguments and errors as of `build_step_table`.
    """
    steps = whole_steps(steps)
    first = torch.arange(1, steps + 1, device="cpu")
    grid = torch.stack([first, first - 1])
    table = _build(schedule, grid, steps, steps, False, prediction, weighting)
    phi, lengths = _path(schedule, grid, steps)
    through, by_output = step_coefficients(prediction, phi[0], phi[1], lengths[0])
    known_end = dataclasses.replace(table, target_z=-through / by_output, target_output=(1 / by_output[:, None],))
    return known_end.map(_cast(dtype, device))


def _cast(dtype: torch.dtype, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a table in {dtype} would round its angles: choose torch.float32 or torch.float64")
    return lambda column: column.to(device, dtype).contiguous()


def _path(schedule: Schedule, grid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the angles of the points u = grid / size, float64 [m + 1, R], and how long the steps between them are, [m, R]."""
    check_schedule(schedule, "phi", "delta")
    u = grid.double() / size
    phi = torch.where(grid == 0, 0, schedule.phi(u))
    # A step that ends at 0 is as long as its angle: schedules may begin a little above.
    lengths = torch.where(grid[1:] == 0, phi[:-1], schedule.delta(u[:-1], (grid[:-1] - grid[1:]).double() / size))
    return phi, torch.where(grid[1:] == grid[:-1], 0, lengths)


def _build(
    schedule: Schedule,
    grid: Tensor,
    size: int,
    steps: int,
    last_by_average: bool,
    prediction: Prediction,
    weighting: Weighting,
) -> StepTable:
    """Return the table in float64 of rows through the points u = grid / size; grid: int64 [m + 1, R], not increasing in its
    columns."""
    says = parameterization(prediction)
    phi, lengths = _path(schedule, grid, size)
    check_start(prediction, float(phi[0, -1]))
    gone = torch.cumsum(lengths, dim=0)

    parts = len(lengths)
    through, by_output = zip(
        *(step_coefficients(prediction, phi[j], phi[j + 1], lengths[j]) for j in range(parts)), strict=True
    )
    # Backwards, with T_j in `onwards`; -sin(gone[-1]) = sin(psi - phi_0).
    onwards, target_z, of_points = torch.ones_like(phi[0]), torch.zeros_like(phi[0]), []
    for j in reversed(range(parts)):
        share = -by_output[j] * onwards / torch.sin(gone[-1])
        of_points.append(says.distance(phi[0]) * share)
        if j > 0:
            target_z = target_z - share * torch.sin(says.slope * gone[j - 1])
        onwards = through[j] * onwards
    asked = [torch.where(length == 0, phi[0], start) for length, start in zip(lengths, phi[:-1], strict=True)]
    outputs = [output_coefficient(prediction, start) for start in asked]
    return StepTable(
        prediction=prediction,
        steps=steps,
        last_by_average=last_by_average,
        angles=(*asked, phi[-1]),
        step_z=through[:-1],
        step_output=tuple(b[:, None] * o for b, o in zip(by_output[:-1], outputs[:-1], strict=True)),
        target_z=target_z,
        target_output=tuple(c[:, None] * o for c, o in zip(reversed(of_points), outputs, strict=True)),
        output=outputs[0],
        weight=natural_weight(prediction, weighting, phi[0]),
    )
