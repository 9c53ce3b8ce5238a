"""What a network predicts, and how errors are weighted: everything as a rotation by the angle phi.

    z = cos x + sin eps      v = cos eps - sin x      x = cos z - sin v      eps = sin z + cos v

A network predicts x, eps, v, or both (x in the first half of its channels, eps in the second, reconciled as
v = cos eps - sin x; Salimans & Ho 2022, section 4). Losses are w(phi) |v - v_hat|^2 with a bounded w; in the network's
own output ("natural" space) that is w / sin^2 on x, w / cos^2 on eps, w on v.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["x", "eps", "v", "both"]
Weighting = Literal["snr", "truncated_snr", "snr_plus_one", "x_mse"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

SMALLEST_COS_FOR_EPS = 0.01  # of the first angle, to distil from
SMALLEST_COS_TO_SAMPLE = 0.001  # below, an error of float32 in eps is one of more than 1e-4 in x


def check_prediction(prediction: str) -> None:
    """ValueError for a name that is none of PREDICTIONS."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}, choose from {', '.join(PREDICTIONS)}")


def check_tensor(name: str, value: Any) -> None:
    """TypeError, which names the argument, for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: give a tensor")


def check_angles(phi: Tensor) -> None:
    """TypeError unless angles are float32 or float64: neighbouring steps are one and the same angle in 16 bits."""
    check_tensor("phi", phi)
    if phi.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"angles of dtype {phi.dtype}: make them from float32 or float64, in which steps can be told apart"
        )


def outputs_per_channel(prediction: Prediction) -> int:
    """P: how many tensors of the data's shape the network puts out."""
    check_prediction(prediction)
    return 2 if prediction == "both" else 1


def check_output(name: str, output: Any, z: Tensor, prediction: Prediction) -> Tensor:
    """What the model called `name` put out at z, [N, C, ...]. TypeError unless that is a tensor of floats, ValueError unless it is
    [N, P*C, ...] and where z is."""
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


def check_start(prediction: Prediction, phi_start: float, least: float = SMALLEST_COS_FOR_EPS) -> None:
    """Refuse (ValueError) an eps-predicting network where it carries no information on x: cos(phi_start) < least."""
    check_prediction(prediction)
    cosine = float(torch.cos(torch.as_tensor(phi_start, dtype=torch.float64, device="cpu")))
    if prediction == "eps" and cosine < least:
        raise ValueError(
            f"eps-prediction is singular at the start of sampling (cos(phi) = {cosine:.2g} < {least}): "
            "x = (z - sin eps) / cos is lost there and distillation to few steps fails; "
            "predict v, x or both instead, or start below, e.g. with StartingAt(schedule, 0.95)"
        )


def at_least_float32(state: Tensor) -> Tensor:
    """A state, or a network's output, in which it is computed with: float32 for 16 bits, else as it is."""
    if not state.is_floating_point():
        raise TypeError(f"states of dtype {state.dtype}: make them floats")
    return state.float() if state.dtype.itemsize < 4 else state


def _like(coefficient: Tensor, z: Tensor) -> Tensor:
    return coefficient.view(*coefficient.shape, *(1,) * (z.dim() - coefficient.dim()))


def _circle(phi: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    check_angles(phi)
    return _like(torch.cos(phi), z), _like(torch.sin(phi), z)


def to_v(prediction: Prediction, output: Tensor, z: Tensor, phi: Tensor) -> Tensor:
    """The v that a network's output means at (z, phi). output [N, P*C, ...], z [N, C, ...], phi [N] or [], float32 or float64.

    Computed and returned in float32 at least, whatever z and output are.
    """
    z, output = at_least_float32(z), at_least_float32(output)
    cos, sin = _circle(phi, z)
    match prediction:
        case "x":
            return (cos * z - output) / sin
        case "eps":
            return (output - sin * z) / cos
        case "v":
            return output
        case "both":
            x, eps = output.chunk(2, dim=1)
            return cos * eps - sin * x
    raise ValueError(f"unknown prediction {prediction!r}, choose from {', '.join(PREDICTIONS)}")


def to_x(prediction: Prediction, output: Tensor, z: Tensor, phi: Tensor) -> Tensor:
    """The x that a network's output means at (z, phi); shapes and dtypes as in `to_v`."""
    z, output = at_least_float32(z), at_least_float32(output)
    cos, sin = _circle(phi, z)
    if prediction == "x":
        return output
    if prediction == "eps":
        return (z - sin * output) / cos
    return cos * z - sin * to_v(prediction, output, z, phi)


def natural_angle(prediction: Prediction, phi: Tensor) -> Tensor:
    """Where on the circle of x and noise the natural target lies, [N]: x = z(0), eps = z(pi/2), v = dz/dphi = z(phi + pi/2)."""
    match prediction:
        case "x":
            return torch.zeros_like(phi)
        case "eps":
            return torch.full_like(phi, math.pi / 2)
    check_prediction(prediction)
    return phi + math.pi / 2


def output_coefficient(prediction: Prediction, phi: Tensor) -> Tensor:
    """How the P outputs combine into the natural prediction: [N, P] for phi [N]; (-sin, cos) for both, else 1."""
    check_prediction(prediction)
    if prediction == "both":
        return torch.stack([-torch.sin(phi), torch.cos(phi)], dim=-1)
    return torch.ones_like(phi)[:, None]


def natural_weight(prediction: Prediction, weighting: Weighting, phi: Tensor) -> Tensor:
    """The weight of a squared error of the natural prediction, [N] for phi [N].

    snr: eps-MSE. truncated_snr: max(x-MSE, eps-MSE). snr_plus_one: v-MSE. x_mse: x-MSE. (Salimans & Ho 2022, section 4)
    """
    cos2, sin2 = torch.cos(phi).square(), torch.sin(phi).square()
    match weighting:
        case "snr":
            weight = cos2
        case "truncated_snr":
            weight = torch.maximum(cos2, sin2)
        case "snr_plus_one":
            weight = torch.ones_like(phi)
        case "x_mse":
            weight = sin2
        case _:
            raise ValueError(f"unknown weighting {weighting!r}, choose from {', '.join(WEIGHTINGS)}")
    match prediction:
        case "x":
            return weight / sin2
        case "eps":
            return weight / cos2
    check_prediction(prediction)
    return weight
