"""Noise schedules: monotone maps from time u in [0, 1] to the angle phi in [0, pi/2], in float64.

alpha = cos(phi), sigma = sin(phi), log-SNR = -2 log tan(phi). A schedule also gives differences of angles,
`delta(u, du) = phi(u) - phi(u - du)`, without the cancellation that a subtraction would suffer: at 4096 steps a
subtraction keeps 12 of float64's 16 digits, and the targets of distillation inherit that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float64


@runtime_checkable
class Schedule(Protocol):
    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the angle in radians at time u; float64, any shape."""

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        """phi(u) - phi(u - du) >= 0 to full relative precision; float64, shapes broadcast."""


def check_schedule(schedule: Any, *methods: str) -> None:
    """Raise a TypeError for what has not these methods, or is the class of a schedule in the place of one."""
    if isinstance(schedule, type):
        raise TypeError(f"schedule is the class {schedule.__name__}: give an instance, {schedule.__name__}(...)")
    if not all(callable(getattr(schedule, name, None)) for name in methods):
        raise TypeError(
            f"schedule is a {type(schedule).__name__}: give an instance such as Cosine(), or of a class with phi(u) and delta(u, du)"
        )


@dataclass(frozen=True)
class Cosine:
    """phi(u) = (pi/2) u: alpha_1 = 0 and sigma_0 = 0 exactly (Nichol & Dhariwal 2021, without their offset)."""

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return u * (math.pi / 2)

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        return (du * (math.pi / 2)).expand_as(u)


@dataclass(frozen=True)
class ClippedCosine:
    """The cosine schedule with log-SNR from logsnr_max at u = 0 to logsnr_min at u = 1, as in Salimans & Ho's code."""

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"logsnr_min {self.logsnr_min} must be below logsnr_max {self.logsnr_max}")

    @property
    def _ends(self) -> tuple[float, float]:
        return math.atan(math.exp(-0.5 * self.logsnr_max)), math.atan(math.exp(-0.5 * self.logsnr_min))

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        low, high = self._ends
        return low + (high - low) * u

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        low, high = self._ends
        return ((high - low) * du).expand_as(u)


@dataclass(frozen=True)
class LinearBeta:
    """alpha^2 = exp(-B(u)), B(u) = beta_min u + (beta_max - beta_min) u^2 / 2: the VP-SDE of Song et al. 2021."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max < math.inf or self.beta_max == 0:
            raise ValueError(
                f"need 0 <= beta_min <= beta_max and beta_max > 0, got {self.beta_min} and {self.beta_max}"
            )

    def _integral(self, u: Tensor) -> Tensor:
        return u * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * u)

    def _sin_and_cos(self, u: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._integral(u)
        return torch.sqrt(-torch.expm1(-integral)), torch.exp(-0.5 * integral)

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.atan2(*self._sin_and_cos(u))

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        # sin(phi - psi) = (alpha_psi^2 - alpha_phi^2) / sin(phi + psi), the numerator by expm1 of the integral's step.
        step = du * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * (2 * u - du))
        numerator = torch.exp(-self._integral(u - du)) * -torch.expm1(-step)
        return torch.asin(numerator / _sine_of_sum(*self._sin_and_cos(u), *self._sin_and_cos(u - du)))


def _sine_of_sum(sin: Tensor, cos: Tensor, other_sin: Tensor, other_cos: Tensor) -> Tensor:
    """sin(phi + psi); from the angles it would lose digits near pi."""
    return sin * other_cos + cos * other_sin


def _from_no_noise(alpha_bars: Tensor) -> Tensor:
    """1, then the T alpha-bars: float64 [T + 1]. ValueError unless these are in [0, 1) and strictly decreasing, but that several
    may be 1, no noise, at the beginning."""
    table = torch.as_tensor(alpha_bars, dtype=torch.float64, device="cpu").flatten()
    table = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), table])
    falls = (table[1:] < table[:-1]) | (table[:-1] + table[1:] == 2)
    if not bool(falls.all()) or not 0 <= float(table[-1]) < 1:
        raise ValueError("alpha_bars must be at least one value in [0, 1), strictly decreasing")
    return table


def table_angles(alpha_bars: Float[Tensor, "t"]) -> Float64[Tensor, "knots"]:
    """Return the angles at no noise and at each of T alpha-bars: float64 [T + 1], from 0. ValueError for what is no such
    table."""
    table = _from_no_noise(alpha_bars)
    return torch.atan2(torch.sqrt(1 - table), torch.sqrt(table))


class AlphaBars:
    """A table of T alpha-bars (alpha^2), entry i at u = (i + 1) / T, angles linear between them and 0 at u = 0.

    alpha_bars: T values, strictly decreasing, in [0, 1), as in `alphas_cumprod` of other codebases. Where betas begin with 0
    the first are 1: between u = 0 and the first that is not, angles are linear too, so that no step has no length.
    """

    def __init__(self, alpha_bars: Float[Tensor, "t"]) -> None:
        table = _from_no_noise(alpha_bars)
        self.knots = table_angles(alpha_bars)
        """The angles at u = 0, 1/T, ..., 1: float64 [T + 1]."""
        sin, cos = torch.sqrt(1 - table), torch.sqrt(table)
        self._rises = torch.asin((table[:-1] - table[1:]) / _sine_of_sum(sin[1:], cos[1:], sin[:-1], cos[:-1]))
        flat = int((self.knots == 0).sum())  # one, where the betas do not begin with 0
        if flat > 1:
            self._rises[:flat] = self.knots[flat] / flat
            self.knots[:flat] = self.knots[flat] * torch.arange(flat, device="cpu") / flat
        self._on = {self.knots.device: (self.knots, self._rises)}

    def _interval(self, u: Tensor) -> tuple[Tensor, Tensor]:
        place = u * len(self._rises)
        interval = place.floor().long().clamp(0, len(self._rises) - 1)
        return interval, place - interval

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        if u.device not in self._on:  # once: a copy in every update would wait for the device
            self._on[u.device] = self.knots.to(u.device), self._rises.to(u.device)
        knots, rises = self._on[u.device]
        interval, fraction = self._interval(u)
        return knots[interval] + fraction * rises[interval]

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        # du at the slope of the lower end, then what the slopes in between differ from it: no large terms cancel.
        u, du = torch.broadcast_tensors(u, du)
        upper, fraction = self._interval(u)
        lower, _ = self._interval(u - du)
        slope = self._rises[lower]
        between = torch.tensor(
            [
                float((self._rises[low + 1 : high] - self._rises[low]).sum())
                for low, high in zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True)
            ],
            dtype=torch.float64,
            device="cpu",
        ).view(u.shape)
        return du * len(self._rises) * slope + fraction * (self._rises[upper] - slope) + between


@dataclass(frozen=True)
class Flow:
    """The straight path of flow matching (Lipman et al. 2022), shifted as for large images (Esser et al. 2024): at u the state is
    (1 - t) x + t eps, up to a factor, with t = shift u / (1 + (shift - 1) u). So tan(phi) = shift u / (1 - u)."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.atan2(self.shift * u, 1 - u)

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        # Between the vectors (1 - u, shift u) and (1 - w, shift w), w = u - du: their cross product is shift du.
        w = u - du
        return torch.atan2((self.shift * du).expand_as(w), (1 - u) * (1 - w) + self.shift**2 * u * w)


@dataclass(frozen=True)
class Karras:
    """The noise levels of EDM's sampler (Karras et al. 2022, eq. 5), phi = atan(sigma): sigma^(1/rho) is linear in u, from sigma_min at
    u = 0 to sigma_max at u = 1."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0 < self.rho < math.inf:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max and rho > 0, got {self.sigma_min}, {self.sigma_max} and {self.rho}"
            )

    def _root(self, u: Tensor) -> tuple[Tensor, float]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low + (high - low) * u, high - low

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.atan(self._root(u)[0] ** self.rho)

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        lower, slope = self._root(u - du)
        sigma = lower**self.rho
        rise = sigma * torch.expm1(self.rho * torch.log1p(slope * du / lower))
        return torch.atan2(rise, 1 + sigma * (sigma + rise))


@dataclass(frozen=True)
class StartingAt:
    """`schedule` on u in [0, u_start], stretched to [0, 1]: sampling starts there instead of at the end."""

    schedule: Schedule
    u_start: float

    def __post_init__(self) -> None:
        check_schedule(self.schedule, "phi", "delta")
        if not 0 < self.u_start <= 1:
            raise ValueError(f"u_start must be in (0, 1], got {self.u_start}")

    def phi(self, u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.schedule.phi(u * self.u_start)

    def delta(self, u: Float[Tensor, "*#n"], du: Float[Tensor, "*#n"]) -> Float[Tensor, "*#n"]:
        return self.schedule.delta(u * self.u_start, du * self.u_start)
