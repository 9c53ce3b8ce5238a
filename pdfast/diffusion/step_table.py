"""The step table of a round: all that depends on time, for each of N student steps, computed once in float64.

Row k in 1..N is the student step from u = k/N to (k-1)/N, which spans the teacher's steps over (k-1/2)/N (Algorithm 2 of
Salimans & Ho 2022). With d1 = phi - phi_mid, d2 = phi_mid - phi_next and d = d1 + d2, the output that takes the student to
where the teacher's two DDIM steps end is, in the network's own prediction,

    x    [ sin(phi_next) sin(d1) x1 + sin(phi) sin(d2) x2 ] / (sin(phi_mid) sin(d))
    eps  [ cos(phi_next) sin(d1) e1 + cos(phi) sin(d2) e2 ] / (cos(phi_mid) sin(d))
    v    [ sin(d1) cos(d2) v1 + sin(d2) v2 - sin(d1) sin(d2) z ] / sin(d)

where nothing cancels. The last angle is 0 for every schedule, so that row 1 is the teacher's second x by itself.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import SupportsIndex

import torch
from torch import Tensor

from pdfast.diffusion.parameterization import (
    Prediction,
    Weighting,
    check_prediction,
    check_start,
    natural_weight,
    output_coefficient,
)
from pdfast.diffusion.schedules import Schedule, check_schedule
from pdfast_kernels.index import in_range, rows_of


@dataclass(frozen=True, eq=False)
class StepTable:
    """One row a step: tensors [N], those that multiply a network's output [N, P]. The arguments of the linear operations
    in `pdfast_kernels`, in their order."""

    prediction: Prediction  # of the networks that it is for
    phi: Tensor  # the student's and the teacher's first angle
    phi_mid: Tensor  # the teacher's second angle
    phi_next: Tensor  # where the step ends
    ddim_z: Tensor  # z_mid = ddim_z z + ddim_output o1
    ddim_output: Tensor
    target_z: Tensor  # target = target_z z + target_output o1 + target_output_mid o2
    target_output: Tensor
    target_output_mid: Tensor
    output: Tensor  # natural prediction of the student = output o
    weight: Tensor  # of the squared error of the natural prediction

    def columns(self) -> tuple[Tensor, ...]:
        """All of its tensors, in their order."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "prediction")

    def _map(self, function: Callable[[Tensor], Tensor]) -> "StepTable":
        return StepTable(self.prediction, *map(function, self.columns()))

    def rows(self, k: Tensor) -> "StepTable":
        """The rows of step indices k in 1..N, int64 [n]. ValueError for another k (on a GPU a row of NaN)."""
        index = in_range("StepTable.rows", "k", k, 1, len(self.phi) + 1) - 1
        return self._map(lambda column: rows_of(column, index))

    def to(self, device: torch.device | str) -> "StepTable":
        """The same table on another device."""
        return self._map(lambda column: column.to(device))


def whole_steps(steps: SupportsIndex) -> int:
    """Return a number of steps, of NumPy or PyTorch too, as an int. ValueError for what is no whole number, or below 1."""
    try:
        number = operator.index(steps)
    except TypeError:
        number = 0
    if number < 1 or isinstance(steps, bool):
        raise ValueError(f"the number of steps must be a whole number, at least 1, got {steps!r}")
    return number


def angles(schedule: Schedule, steps: SupportsIndex) -> Tensor:
    """The angles of a sampler with that many steps, from phi(1) down to exactly 0: float64 [steps + 1].

    TypeError for what is no schedule, ValueError for what is no number of steps.
    """
    check_schedule(schedule, "phi")
    steps = whole_steps(steps)
    phi = schedule.phi(torch.arange(steps, -1, -1, dtype=torch.float64, device="cpu") / steps)
    phi[-1] = 0
    return phi


def ddim_coefficients(prediction: Prediction, phi: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """z' = a z + sum_p b_p o_p, the DDIM step from angle phi down to phi - delta: float64 ([N], [N, P]) for [N]."""
    match prediction:
        case "x":
            return torch.sin(phi - delta) / torch.sin(phi), (torch.sin(delta) / torch.sin(phi))[:, None]
        case "eps":
            return torch.cos(phi - delta) / torch.cos(phi), (-torch.sin(delta) / torch.cos(phi))[:, None]
    return torch.cos(delta), -torch.sin(delta)[:, None] * output_coefficient(prediction, phi)


def build_step_table(
    schedule: Schedule,
    steps: SupportsIndex,
    prediction: Prediction,
    weighting: Weighting,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StepTable:
    """The table of a round with `steps` student steps, for networks of that prediction, in float32 or float64.

    ValueError for eps-prediction from (almost) pure noise, and for what is unknown; TypeError for what is no schedule.
    """
    check_schedule(schedule, "phi", "delta")
    steps = whole_steps(steps)
    check_prediction(prediction)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a table in {dtype} would round its angles: choose torch.float32 or torch.float64")
    k = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu")
    half = torch.tensor(0.5 / steps, dtype=torch.float64, device="cpu")
    u, u_mid = k / steps, (k - 0.5) / steps
    phi, phi_mid = schedule.phi(u), schedule.phi(u_mid)
    phi_next = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), phi[:-1]])
    d1 = schedule.delta(u, half)
    d2 = torch.cat([phi_mid[:1], schedule.delta(u_mid[1:], half)])
    check_start(prediction, float(phi[-1]))

    sin_d = torch.sin(d1 + d2)
    target_z = torch.zeros_like(phi)
    match prediction:
        case "x":
            first = torch.sin(phi_next) * torch.sin(d1) / (torch.sin(phi_mid) * sin_d)
            second = torch.sin(phi) * torch.sin(d2) / (torch.sin(phi_mid) * sin_d)
        case "eps":
            first = torch.cos(phi_next) * torch.sin(d1) / (torch.cos(phi_mid) * sin_d)
            second = torch.cos(phi) * torch.sin(d2) / (torch.cos(phi_mid) * sin_d)
        case _:
            first = torch.sin(d1) * torch.cos(d2) / sin_d
            second = torch.sin(d2) / sin_d
            target_z = -torch.sin(d1) * torch.sin(d2) / sin_d
    output = output_coefficient(prediction, phi)
    ddim_z, ddim_output = ddim_coefficients(prediction, phi, d1)
    table = StepTable(
        prediction=prediction,
        phi=phi,
        phi_mid=phi_mid,
        phi_next=phi_next,
        ddim_z=ddim_z,
        ddim_output=ddim_output,
        target_z=target_z,
        target_output=first[:, None] * output,
        target_output_mid=second[:, None] * output_coefficient(prediction, phi_mid),
        output=output,
        weight=natural_weight(prediction, weighting, phi),
    )
    return table._map(lambda column: column.to(device, dtype))
