"""Samplers: from noise at the schedule's last angle down to images at angle 0.

A model is anything with `model(z, phi, cond=None) -> output` and an attribute `prediction`; z is [N, C, ...] float, phi
[N] float32 in radians. Sampling never takes gradients.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pdfast.diffusion.parameterization import SMALLEST_COS_TO_SAMPLE, Prediction, check_start, to_x
from pdfast.diffusion.schedules import Schedule
from pdfast.diffusion.step_table import angles, ddim_coefficients
from pdfast_kernels import ddim_step


class Model(Protocol):
    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor: ...


def _column(value: Tensor, z: Tensor) -> Tensor:
    return value.to(z).reshape(1, -1).expand(len(z), -1)


def ddim(model: Model, z: Tensor, phi: Tensor, *, cond: Any = None, clip: bool = False) -> Tensor:
    """DDIM (Song et al. 2021) through the angles phi, float64 [steps + 1], decreasing; z is at phi[0], any angle.

    clip: clip each x-prediction to [-1, 1] and let eps follow, as the authors did in evaluation. Returns z at phi[-1].
    """
    check_start(model.prediction, float(phi[0]), SMALLEST_COS_TO_SAMPLE)
    with torch.no_grad():
        for here, there in zip(phi[:-1], phi[1:], strict=True):
            output = model(z, here.to(z.device, torch.float32).expand(len(z)), cond)
            prediction = model.prediction
            if clip:
                output, prediction = to_x(prediction, output, z, here.to(z)).clamp(-1, 1), "x"
            a, b = ddim_coefficients(prediction, here[None], (here - there)[None])
            z = ddim_step(z, output, _column(a, z)[:, 0], _column(b, z))
    return z


def ancestral(
    model: Model,
    z: Tensor,
    phi: Tensor,
    noise: Callable[[int], Tensor],
    *,
    variance: float = 0.0,
    cond: Any = None,
    clip: bool = False,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) through the angles phi, as `ddim`; `noise(i)` is the noise of step i, like z.

    variance: 0 is the smaller (posterior) variance, 1 the larger, between them the geometric interpolation of the paper's
    appendix ("medium"). The last step returns its mean.
    """
    if not 0 <= variance <= 1:
        raise ValueError(f"variance must be in [0, 1], got {variance}")
    check_start(model.prediction, float(phi[0]), SMALLEST_COS_TO_SAMPLE)
    with torch.no_grad():
        for i, (here, there) in enumerate(zip(phi[:-1], phi[1:], strict=True)):
            output = model(z, here.to(z.device, torch.float32).expand(len(z)), cond)
            x = to_x(model.prediction, output, z, here.to(z))
            if clip:
                x = x.clamp(-1, 1)
            if there == 0:
                z = x
                continue
            sin2, sin2_next = torch.sin(here) ** 2, torch.sin(there) ** 2
            cos, cos_next = torch.cos(here), torch.cos(there)
            # 1 - SNR(here) / SNR(there), by sin^2 a cos^2 b - cos^2 a sin^2 b = sin(a + b) sin(a - b)
            lost = torch.sin(here + there) * torch.sin(here - there) / (sin2 * cos_next**2)
            mean = (sin2_next * cos / (cos_next * sin2)).to(z) * z + (lost * cos_next).to(z) * x
            deviation = torch.sqrt(lost * sin2**variance * sin2_next ** (1 - variance))
            z = mean + deviation.to(z) * noise(i)
    return z


def sample(model: Model, z: Tensor, schedule: Schedule, steps: int, *, cond: Any = None, clip: bool = False) -> Tensor:
    """DDIM in `steps` steps from noise z [N, C, ...] ~ N(0, 1): images in about [-1, 1], same shape."""
    return ddim(model, z, angles(schedule, steps), cond=cond, clip=clip)
