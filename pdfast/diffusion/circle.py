"""The circle: with one image x and one noise eps every state of diffusion is a point of it, and every prediction another.

    z(phi) = cos(phi) x + sin(phi) eps

A network at angle phi says what the point at `theta = offset + slope * phi` is: x is at 0, eps at pi/2, v = dz/dphi at
phi + pi/2 (Salimans & Ho 2022, section 4), rectified flow's eps - x, over sqrt 2, at 3 pi/4. From z at phi and that point o,
the point at any angle psi is

    z(psi) = [ sin(theta - psi) z + sin(psi - phi) o ] / sin(theta - phi)                                              (1)

which is the DDIM step to psi, an Euler step of a flow's equation, and the conversion from one prediction to another.
A new parameterization is a row of PARAMETERIZATIONS and a word of Prediction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Prediction = Literal["x", "eps", "v", "both", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

SMALLEST_SINE_TO_DISTILL = 0.01  # of theta - phi at the first angle
SMALLEST_SINE_TO_SAMPLE = 0.001  # below, an error of float32 in eps is one of more than 1e-4 in x


def _alone(phi: Tensor) -> tuple[Tensor, ...]:
    return (torch.ones_like(phi),)


def _x_and_eps(phi: Tensor) -> tuple[Tensor, ...]:
    return -torch.sin(phi), torch.cos(phi)


def _over_sqrt2(phi: Tensor) -> tuple[Tensor, ...]:
    return (torch.full_like(phi, math.sqrt(0.5)),)


@dataclass(frozen=True)
class Parameterization:
    """What a network says: the point of the circle at `quarters * pi/2 + slope * phi`."""

    quarters: float  # the offset in units of pi/2, so that those of x, eps and v are exact
    slope: float
    outputs: Callable[[Tensor], tuple[Tensor, ...]] = _alone
    """At angles phi, what each of the network's P outputs is multiplied by; the sum is the point."""

    def same_point(self, other: Parameterization) -> bool:
        """Tell whether both name the same point at every phi; their outputs may combine otherwise."""
        return (self.quarters, self.slope) == (other.quarters, other.slope)

    def angle(self, phi: Tensor) -> Tensor:
        """theta, like phi."""
        return self.quarters * (math.pi / 2) + self.slope * phi

    def sine(self, turn: Tensor) -> Tensor:
        """sin(offset + turn); for a whole number of quarters without the error of pi/2."""
        cosine, sine = _WHOLE.get(self.quarters % 4) or (
            math.cos(self.quarters * math.pi / 2),
            math.sin(self.quarters * math.pi / 2),
        )
        return sine * torch.cos(turn) + cosine * torch.sin(turn)

    def distance(self, phi: Tensor) -> Tensor:
        """sin(theta - phi), which is what errors of the point are divided by to become errors of v."""
        return self.sine((self.slope - 1) * phi)


_WHOLE: dict[float, tuple[int, int]] = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}
"""Cosine and sine of whole numbers of quarters."""

PARAMETERIZATIONS: dict[str, Parameterization] = {
    "x": Parameterization(0, 0),
    "eps": Parameterization(1, 0),
    "v": Parameterization(1, 1),
    "both": Parameterization(1, 1, _x_and_eps),  # x in the first half of the channels, eps in the second
    "flow": Parameterization(1.5, 0, _over_sqrt2),  # the output is eps - x (Liu et al. 2022; Lipman et al. 2022)
}


def parameterization(prediction: str) -> Parameterization:
    """Return the row of PARAMETERIZATIONS of that name. ValueError where there is none."""
    if prediction not in PARAMETERIZATIONS:
        raise ValueError(f"unknown prediction {prediction!r}, choose from {', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[prediction]


def check_tensor(name: str, value: Any) -> None:
    """TypeError, which names the argument, for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: give a tensor")


def check_angles(phi: Tensor) -> None:
    """Raise a TypeError unless angles are float32 or float64: neighbouring steps are one and the same angle in 16 bits."""
    check_tensor("phi", phi)
    if phi.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"angles of dtype {phi.dtype}: make them from float32 or float64, in which steps can be told apart"
        )


def check_start(prediction: str, phi_start: float, least: float = SMALLEST_SINE_TO_DISTILL) -> None:
    """Refuse (ValueError) a network where what it says carries no information on x: 0 <= sin(theta - phi_start) < least.

    So it is with eps from pure noise. On the other side of phi, as with x near the image, a step goes towards theta and
    magnifies nothing.
    """
    sine = float(parameterization(prediction).distance(torch.as_tensor(phi_start, dtype=torch.float64, device="cpu")))
    if 0 <= sine < least:
        raise ValueError(
            f"{prediction}-prediction is singular at the start of sampling (sin(theta - phi) = {sine:.2g} < {least}): "
            "it says nothing about x there, and distillation to few steps fails; "
            "predict v, x or both instead, or start below, e.g. with StartingAt(schedule, 0.95)"
        )


def at_least_float32(state: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Return a state, or a network's output, in which it is computed with: float32 for 16 bits, else as it is."""
    if not state.is_floating_point():
        raise TypeError(f"states of dtype {state.dtype}: make them floats")
    return state.float() if state.dtype.itemsize < 4 else state


@functools.cache
def outputs_per_channel(prediction: str) -> int:
    """P: how many tensors of the data's shape the network puts out."""
    return len(parameterization(prediction).outputs(torch.zeros(())))


def check_output(name: str, output: Any, z: Tensor, prediction: str) -> Tensor:
    """Return what the model called `name` put out at z, [N, C, ...]. TypeError unless that is a tensor of floats, ValueError
    unless it is [N, P*C, ...] and where z is."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} returned a {type(output).__name__}: let it return the tensor alone, such as output[0], or output.sample of diffusers"
        )
    if not output.is_floating_point():
        raise TypeError(f"{name} returned a tensor of dtype {output.dtype}: let it return floats")
    expected = (*z.shape[:1], *(outputs_per_channel(prediction) * size for size in z.shape[1:2]), *z.shape[2:])
    if output.shape != expected:
        raise ValueError(
            f"{name} returned shape {tuple(output.shape)}: of z {tuple(z.shape)}, prediction {prediction!r} is {expected}"
        )
    if output.device != z.device:
        raise ValueError(f"{name} returned a tensor on {output.device}, z is on {z.device}: move the model there")
    return output


def natural_angle(prediction: str, phi: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """theta, where on the circle what the network says lies at angles phi; like phi."""
    return parameterization(prediction).angle(phi)


def output_coefficient(prediction: str, phi: Float[Tensor, "*n"]) -> Float[Tensor, "*n p"]:
    """Return how the P outputs combine into the point at theta: [N, P] for phi [N]."""
    return torch.stack(parameterization(prediction).outputs(phi), dim=-1)


def step_coefficients(
    prediction: str, phi: Float[Tensor, "n"], psi: Float[Tensor, "n"], delta: Float[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(a, b), each [N], of z(psi) = a z + b o, the point at psi by (1); a step of no length is 1 and 0.

    phi, psi: angles, float64 [N]. delta: phi - psi, which `Schedule.delta` knows to more digits than a subtraction.
    """
    says = parameterization(prediction)
    distance = says.distance(phi)
    # theta - psi, in which nothing cancels for any slope in [0, 1].
    beyond = says.sine((says.slope - 1) * psi + says.slope * delta)
    stays = delta == 0
    return torch.where(stays, 1, beyond / distance), torch.where(stays, 0, -torch.sin(delta) / distance)


def ddim_coefficients(
    prediction: str, phi: Float[Tensor, "n"], delta: Float[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n p"]]:
    """z' = a z + sum_p b_p o_p, the DDIM step (Song et al. 2021) from angle phi down to phi - delta: float64 ([N], [N, P])
    for [N]."""
    a, b = step_coefficients(prediction, phi, phi - delta, delta)
    return a, b[:, None] * output_coefficient(prediction, phi)


def conversion_coefficients(
    prediction: str, other: str, phi: Float[Tensor, "*n"], least_sine: float = 0.0
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n p"]]:
    """(a, b), [N] and [N, P] for phi [N], of other = a z + sum_p b_p o_p: what the outputs o of a network mean as another prediction.

    It is infinite where sin(theta - phi) = 0; least_sine keeps that away from 0.
    """
    here, there = parameterization(prediction), parameterization(other)
    outputs = output_coefficient(prediction, phi)
    if here.same_point(there):
        return torch.zeros_like(phi), outputs
    distance = here.distance(phi)
    if least_sine:
        # Of its sign between the ends: at an end rounding gives it another.
        side = math.copysign(1, math.sin(here.quarters * math.pi / 2 + (here.slope - 1) * math.pi / 4))
        distance = side * (side * distance).clamp(min=least_sine)
    between = Parameterization(here.quarters - there.quarters, 0).sine((here.slope - there.slope) * phi)
    return between / distance, (there.distance(phi) / distance)[..., None] * outputs


def _convert(prediction: str, other: str, output: Tensor, z: Tensor, phi: Tensor) -> Tensor:
    check_angles(phi)
    z, output = at_least_float32(z), at_least_float32(output)
    a, b = conversion_coefficients(prediction, other, phi)
    columns = [c.view(*c.shape, *(1,) * (z.dim() - c.dim())) for c in (a, *b.unbind(-1))]
    converted = columns[0] * z
    for column, part in zip(columns[1:], output.chunk(len(columns) - 1, dim=1), strict=True):
        converted = converted + column * part
    return converted


def to_v(
    prediction: str, output: Float[Tensor, "n pc *s"], z: Float[Tensor, "n c *s"], phi: Float[Tensor, "*k"]
) -> Float[Tensor, "n c *s"]:
    """Return the v that a network's output means at (z, phi). output [N, P*C, ...], z [N, C, ...], phi [N] or [], float32 or
    float64.

    Computed and returned in float32 at least, whatever z and output are.
    """
    return _convert(prediction, "v", output, z, phi)


def to_x(
    prediction: str, output: Float[Tensor, "n pc *s"], z: Float[Tensor, "n c *s"], phi: Float[Tensor, "*k"]
) -> Float[Tensor, "n c *s"]:
    """Return the x that a network's output means at (z, phi); shapes and dtypes as in `to_v`."""
    return _convert(prediction, "x", output, z, phi)
