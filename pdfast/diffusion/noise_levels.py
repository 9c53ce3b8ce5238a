"""Angles from other measures of noise, and back, in float64: sigma, log-SNR, alpha-bar, discrete times, and the time of flow matching.

All of them name a state by how much noise is in it; what they call the state differs by a factor. With z = cos(phi) x + sin(phi) eps,

    EDM's state                x + sigma eps          is  z / cos(phi)
    DDPM's                     alpha x + sigma eps    is  z
    flow matching's            (1 - t) x + t eps      is  z / (cos(phi) + sin(phi))

Arguments are tensors of any shape, or numbers; results are float64 tensors of that shape.
"""

import torch
from torch import Tensor

from pdfast.diffusion.schedules import table_angles


def _float64(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def phi_from_sigma(sigma: Tensor | float) -> Tensor:
    """The angle of x + sigma eps, as in EDM (Karras et al. 2022): atan(sigma)."""
    return torch.atan(_float64(sigma))


def sigma_from_phi(phi: Tensor | float) -> Tensor:
    """The inverse of `phi_from_sigma`, tan(phi); 1.6e16 at pi/2, which is a little less in float64."""
    return torch.tan(_float64(phi))


def phi_from_logsnr(logsnr: Tensor | float) -> Tensor:
    """The angle of a log-SNR, log(alpha^2 / sigma^2): the inverse of `logsnr`. Infinite ones are 0 and pi/2."""
    return torch.atan(torch.exp(-0.5 * _float64(logsnr)))


def logsnr(phi: Tensor | float) -> Tensor:
    """-2 log tan(phi) = log(alpha^2 / sigma^2)."""
    phi = _float64(phi)
    return 2 * (torch.log(torch.cos(phi)) - torch.log(torch.sin(phi)))


def phi_from_alpha_bar(alpha_bar: Tensor | float) -> Tensor:
    """The angle of sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps, as in DDPM (Ho et al. 2020)."""
    alpha_bar = _float64(alpha_bar)
    return torch.atan2(torch.sqrt(1 - alpha_bar), torch.sqrt(alpha_bar))


def alpha_bar_from_phi(phi: Tensor | float) -> Tensor:
    """The inverse of `phi_from_alpha_bar`: cos^2(phi)."""
    return torch.cos(_float64(phi)).square()


def phi_from_time(t: Tensor | float, alpha_bars: Tensor) -> Tensor:
    """The angles of discrete times t in 0..T-1 of a network trained with T alpha-bars (`alphas_cumprod` of other codebases).

    Between times they are linear, and -1 is no noise, at 0; times beyond are those of the ends. ValueError for alpha_bars that do
    not strictly decrease, but for several that are 1 at the beginning.
    """
    t = _float64(t)
    knots = table_angles(alpha_bars).to(t.device)
    place = (t + 1).clamp(0, len(knots) - 1)
    lower = place.floor().long().clamp(max=len(knots) - 2)
    return torch.lerp(knots[lower], knots[lower + 1], place - lower)


def time_from_phi(phi: Tensor | float, alpha_bars: Tensor) -> Tensor:
    """The inverse of `phi_from_time`: times in -1..T-1, fractional between those of the table."""
    phi = _float64(phi)
    knots = table_angles(alpha_bars).to(phi.device)
    upper = torch.searchsorted(knots, phi.contiguous(), right=True).clamp(1, len(knots) - 1)
    return upper - 2 + ((phi - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).clamp(0, 1)


def phi_from_flow_time(t: Tensor | float, shift: float = 1.0) -> Tensor:
    """The angle of (1 - t') x + t' eps, where t in [0, 1] is flow matching's time and t' = shift t / (1 + (shift - 1) t).

    ValueError for a shift that is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    t = _float64(t)
    return torch.atan2(shift * t, 1 - t)


def flow_time_from_phi(phi: Tensor | float, shift: float = 1.0) -> Tensor:
    """The inverse of `phi_from_flow_time`; with a shift of 1 it is t', the noise in (1 - t') x + t' eps, and what such a network is
    told."""
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    phi = _float64(phi)
    sin, cos = torch.sin(phi), torch.cos(phi)
    return sin / (shift * cos + sin)
