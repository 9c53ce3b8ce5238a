"""EDM's preconditioning (Karras et al. 2022) in angles, phi = atan(sigma).

Around a network F the denoiser (eq. 7 there) is, on the circle, with q^2 = sin^2 + sigma_data^2 cos^2,

    v = (1 - sigma_data^2) sin cos / q^2 z - sigma_data / q F(z / q; log(tan phi) / 4)

where nothing is singular: such a network predicts v.
"""

import math

import torch
from torch import Tensor

from pdfast.config import ScheduleConfig


def coefficients(phi: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """(s, a, b), each [N], of v = a z + b F(s z)."""
    cos, sin = torch.cos(phi), torch.sin(phi)
    inverse = torch.rsqrt(sin.square() + sigma_data**2 * cos.square())
    return inverse, (1 - sigma_data**2) * sin * cos * inverse.square(), -sigma_data * inverse


def noise_label(phi: Tensor, sigma_min: float) -> Tensor:
    """What F is told of the noise, log(sigma) / 4 at angles phi [N]; below sigma_min as there, and finite at pi/2."""
    sigma = torch.sin(phi) / torch.cos(phi).clamp(min=1e-7)
    return torch.log(sigma.clamp(min=sigma_min)) / 4


def schedule(sigma_min: float, sigma_max: float) -> ScheduleConfig:
    """From sigma_max to sigma_min."""
    return ScheduleConfig(
        name="clipped_cosine", logsnr_min=-2 * math.log(sigma_max), logsnr_max=-2 * math.log(sigma_min)
    )


SIGMAS = 1e-6, 1e6
"""The least and the most sigma: no model has others, and float32 does not tell their angles from 0 and pi/2."""


def check_sigmas(sigma_min: float, sigma_max: float, sigma_data: float) -> None:
    """Raise a ValueError where these are no noise levels and no standard deviation of data; NaN is none."""
    least, most = SIGMAS
    if not least <= sigma_min < sigma_max <= most:
        raise ValueError(
            f"need {least:g} <= sigma_min < sigma_max <= {most:g}, got sigma_min = {sigma_min} and sigma_max = {sigma_max}"
        )
    if not least <= sigma_data <= most:
        raise ValueError(f"sigma_data must be in [{least:g}, {most:g}], got {sigma_data}")
