"""A network around another, by functions of the angle: what other people's networks become in our call.

    o = a(phi) z + sum_p b_p(phi) F_p(s(phi) z, label(phi), cond)

F is the network inside, with P outputs of the data's shape. EDM's preconditioning and a network read as one of another
prediction are such functions, and no classes of their own.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdfast.diffusion import conversion_coefficients
from pdfast.networks.network import Network

SMALLEST_COSINE = 1e-7  # of a noise level: at pi/2 it stays finite


class Coefficients(NamedTuple):
    """What a wrapping multiplies by, at N angles; float tensors."""

    s: Tensor | None
    """[N], of F's input; None for 1."""
    a: Tensor
    """[N], of z."""
    b: Tensor
    """[N, P], of F's outputs."""


@dataclass(frozen=True)
class Wrapping:
    """The functions of a wrapper: each maps angles phi [N], in radians."""

    coefficients: Callable[[Tensor], Coefficients] | None = None
    """None where z goes in, and F's output comes out, as it is."""
    label: Callable[[Tensor], Tensor] | None = None
    """What F is told in the place of the angle, [N]; None for the angle."""


class Wrapped(Network):
    """`network(z, phi, cond) -> o` of a network inside, which is called `F(z, label, cond)` and has `dtype` and `blocks` as a
    Network has."""

    network: Any
    """The one inside, by the name that it has unless another is said."""

    def __init__(self, config: Any, inner: nn.Module, wrapping: Wrapping, name: str = "network") -> None:
        """name: of the network inside, in the names of the weights."""
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        self.wrapping, self._name = wrapping, name
        self.add_module(name, inner)

    @property
    def inner(self) -> Any:
        """The network inside."""
        return getattr(self, self._name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.inner.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.inner.dtype = dtype

    def blocks(self) -> Iterator[nn.Module]:
        return self.inner.blocks()

    def label(self, phi: Tensor) -> Tensor:
        """Return what the network inside is told at angles phi [N]."""
        return phi if self.wrapping.label is None else self.wrapping.label(phi)

    def call(self, z: Tensor, label: Tensor, cond: Any) -> Tensor:
        """Ask the network inside: float32 [N, P*C, ...]."""
        return self.inner(z, label, cond)

    def forward(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor:
        z = z.float()
        if self.wrapping.coefficients is None:
            return self.call(z, self.label(phi), cond)
        s, a, b = self.wrapping.coefficients(phi)
        column = (-1, *(1,) * (z.dim() - 1))
        outputs = self.call(z if s is None else s.view(column) * z, self.label(phi), cond).chunk(b.shape[1], dim=1)
        result = a.view(column) * z
        for p, output in enumerate(outputs):
            result = result + b[:, p].view(column) * output
        return result


class Autocasted(Wrapped):
    """One whose network inside knows nothing of dtypes: autocast gives its activations theirs."""

    dtype: torch.dtype = torch.float32

    def blocks(self) -> Iterator[nn.Module]:
        """Yield nothing: of the network inside nothing is known."""
        return iter(())

    def call(self, z: Tensor, label: Tensor, cond: Any) -> Tensor:
        half = self.dtype == torch.bfloat16
        with torch.autocast(z.device.type, torch.bfloat16, cache_enabled=False) if half else nullcontext():
            return self.ask(z, label, cond).float()

    def ask(self, z: Tensor, label: Tensor, cond: Any) -> Tensor:
        """Ask the network inside, in its own words."""
        return self.inner(z, label, cond)


def conversion(prediction: str, other: str, least_sine: float) -> Wrapping:
    """Read a network that predicts `prediction` as one that predicts `other`; what is divided by is kept at least_sine."""
    return Wrapping(functools.partial(_conversion, prediction, other, least_sine))


def _conversion(prediction: str, other: str, least_sine: float, phi: Tensor) -> Coefficients:
    return Coefficients(None, *conversion_coefficients(prediction, other, phi, least_sine))


def preconditioning(sigma_data: float, sigma_min: float, sign: float = 1.0) -> Wrapping:
    """EDM's (Karras et al. 2022), with phi = atan(sigma). Around F the denoiser (eq. 7 there) is, with
    q^2 = sin^2 + sigma_data^2 cos^2,

        v = (1 - sigma_data^2) sin cos / q^2 z - sigma_data / q F(z / q; log(tan phi) / 4)

    where nothing is singular: such a network predicts v. sign: -1 where F's output is to be added. sigma_min: what F is told
    of less noise, as there.
    """
    return Wrapping(
        functools.partial(_preconditioning, sigma_data, sign), functools.partial(_quarter_log_sigma, sigma_min)
    )


def _preconditioning(sigma_data: float, sign: float, phi: Tensor) -> Coefficients:
    cos, sin = torch.cos(phi), torch.sin(phi)
    inverse = torch.rsqrt(sin.square() + sigma_data**2 * cos.square())
    a = (1 - sigma_data**2) * sin * cos * inverse.square()
    return Coefficients(inverse, a, (-sign * sigma_data * inverse)[:, None])


def _quarter_log_sigma(sigma_min: float, phi: Tensor) -> Tensor:
    sigma = torch.sin(phi) / torch.cos(phi).clamp(min=SMALLEST_COSINE)
    return torch.log(sigma.clamp(min=sigma_min)) / 4
