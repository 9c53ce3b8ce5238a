"""Angles from other measures of noise, and back, in float64: sigma, log-SNR, alpha-bar, discrete times, and the time of flow matching.

All of them name a state by how much noise is in it; what they call the state differs by a factor. With z = cos(phi) x + sin(phi) eps,

    EDM's state                x + sigma eps          is  z / cos(phi)
    DDPM's                     alpha x + sigma eps    is  z
    flow matching's            (1 - t) x + t eps      is  z / (cos(phi) + sin(phi))

Arguments are tensors of any shape, or numbers; results are float64 tensors of that shape. All functions raise a ValueError that
names the argument and its range for a number, or a value of a tensor on the CPU, that is out of it, or NaN. Of a GPU's tensor, and
in compiled code, where asking would be a wait, the results of such values are NaN. An angle may be over pi/2 as float32(pi/2) is.
"""

import math

import torch
from torch import Tensor

from pdfast.diffusion.schedules import table_angles
from pdfast_kernels.runtime.index import asked

RIGHT = math.pi / 2
RIGHT_OF_FLOAT32 = 1.5707963705062866  # is larger than pi/2


def _within(name: str, value: Tensor | float, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Return an argument in float64. ValueError, or NaN where values are not asked, for what is not in [low, high];
    TypeError for what is not made of numbers."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is a {type(value).__name__}: give a tensor of numbers, or a number") from None
    if isinstance(value, int | float):
        wrong = [] if low <= value <= high else [float(value)]
    else:
        inside = (tensor >= low) & (tensor <= high)
        if tensor.device.type != "cpu" or torch.compiler.is_compiling() or not asked(tensor):
            return torch.where(inside, tensor, torch.nan)
        wrong = [] if bool(inside.all()) else tensor[~inside].tolist()
    if wrong:
        expected = {
            (-math.inf, math.inf): "a number",
            (0, math.inf): "at least 0",
            (0, RIGHT_OF_FLOAT32): "in [0, pi/2]",
        }.get((low, high), f"in [{low:g}, {high:g}]")
        raise ValueError(f"{name} must be {expected}, got {wrong[0]:g}")
    return tensor


def _angle(phi: Tensor | float) -> Tensor:
    return _within("phi", phi, 0, RIGHT_OF_FLOAT32).clamp(max=RIGHT)


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive, got {shift}")


def phi_from_sigma(sigma: Tensor | float) -> Tensor:
    """Return the angle of x + sigma eps, as in EDM (Karras et al. 2022): atan(sigma), for sigma >= 0."""
    return torch.atan(_within("sigma", sigma, 0))


def sigma_from_phi(phi: Tensor | float) -> Tensor:
    """Return the inverse of `phi_from_sigma`, tan(phi); 1.6e16 at pi/2, which is a little less in float64."""
    return torch.tan(_angle(phi))


def phi_from_logsnr(logsnr: Tensor | float) -> Tensor:
    """Return the angle of a log-SNR, log(alpha^2 / sigma^2): the inverse of `logsnr`. Infinite ones are 0 and pi/2."""
    return torch.atan(torch.exp(-0.5 * _within("logsnr", logsnr)))


def logsnr(phi: Tensor | float) -> Tensor:
    """-2 log tan(phi) = log(alpha^2 / sigma^2)."""
    phi = _angle(phi)
    return 2 * (torch.log(torch.cos(phi)) - torch.log(torch.sin(phi)))


def phi_from_alpha_bar(alpha_bar: Tensor | float) -> Tensor:
    """Return the angle of sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps, as in DDPM (Ho et al. 2020); alpha_bar is in [0, 1]."""
    alpha_bar = _within("alpha_bar", alpha_bar, 0, 1)
    return torch.atan2(torch.sqrt(1 - alpha_bar), torch.sqrt(alpha_bar))


def alpha_bar_from_phi(phi: Tensor | float) -> Tensor:
    """Return the inverse of `phi_from_alpha_bar`: cos^2(phi)."""
    return torch.cos(_angle(phi)).square()


def phi_from_time(t: Tensor | float, alpha_bars: Tensor) -> Tensor:
    """Return the angles of discrete times t in 0..T-1 of a network trained with T alpha-bars (`alphas_cumprod` of other
    codebases).

    Between times they are linear, and -1 is no noise, at 0; times beyond are those of the ends. ValueError for alpha_bars that do
    not strictly decrease, but for several that are 1 at the beginning.
    """
    t = _within("t", t)
    knots = table_angles(alpha_bars).to(t.device)
    place = (t + 1).clamp(0, len(knots) - 1)
    lower = place.nan_to_num(0).floor().long().clamp(max=len(knots) - 2)
    return torch.lerp(knots[lower], knots[lower + 1], place - lower)


def time_from_phi(phi: Tensor | float, alpha_bars: Tensor) -> Tensor:
    """Return the inverse of `phi_from_time`: times in -1..T-1, fractional between those of the table."""
    phi = _angle(phi)
    knots = table_angles(alpha_bars).to(phi.device)
    upper = torch.searchsorted(knots, phi.contiguous(), right=True).clamp(1, len(knots) - 1)
    return upper - 2 + ((phi - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).clamp(0, 1)


def phi_from_flow_time(t: Tensor | float, shift: float = 1.0) -> Tensor:
    """Return the angle of (1 - t') x + t' eps, where t in [0, 1] is flow matching's time and t' = shift t / (1 + (shift - 1)
    t).

    ValueError for a shift that is not positive.
    """
    _check_shift(shift)
    t = _within("t", t, 0, 1)
    return torch.atan2(shift * t, 1 - t)


def flow_time_from_phi(phi: Tensor | float, shift: float = 1.0) -> Tensor:
    """Return the inverse of `phi_from_flow_time`; with a shift of 1 it is t', the noise in (1 - t') x + t' eps, and what
    such a network is told."""
    _check_shift(shift)
    phi = _angle(phi)
    sin, cos = torch.sin(phi), torch.cos(phi)
    return sin / (shift * cos + sin)
