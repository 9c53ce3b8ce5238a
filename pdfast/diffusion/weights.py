"""How errors are weighted: w(phi) |v - v_hat|^2 with a bounded w, which on the point o that a network says is w / sin^2(theta - phi).

That is w / sin^2 on x, w / cos^2 on eps, w on v (Salimans & Ho 2022, section 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from pdfast.diffusion.circle import parameterization

if TYPE_CHECKING:
    from jaxtyping import Float

Weighting = Literal["snr", "truncated_snr", "snr_plus_one", "x_mse"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def natural_weight(prediction: str, weighting: str, phi: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return the weight of a squared error of what the network says, [N] for phi [N].

    snr: eps-MSE. truncated_snr: max(x-MSE, eps-MSE). snr_plus_one: v-MSE. x_mse: x-MSE. ValueError for another.
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
    return weight / parameterization(prediction).distance(phi).square()
