"""A v-predicting copy of a network that predicts eps or x, which can then be distilled to one step.

    v = (eps - sin z) / cos        v = (cos z - x) / sin

The first divides by 0 at the start of sampling, the second at its end. There the divisor is kept at LEAST instead: the
copy is exact wherever it is not, continuous everywhere, and what it has to learn is small.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pdfast.diffusion import Prediction, conversion_coefficients, parameterization
from pdfast.errors import UsageError
from pdfast.networks import Network
from pdfast.networks.network import Around

LEAST = 0.1


@dataclass(frozen=True)
class ConvertedConfig(Around):
    """A network made to predict v."""

    network: Any
    """The configuration of the one inside."""
    kind: str = "converted"
    prediction: Prediction = "v"

    def __post_init__(self) -> None:
        if self.network.prediction == "v":
            raise UsageError("this teacher predicts v already: there is nothing to convert")

    @property
    def inside(self) -> Any:
        return self.network

    def build(self, dropout: float = 0.0) -> "Converted":
        return Converted(self, dropout)


def regular_angles(prediction: Prediction, end: float) -> tuple[float, float]:
    """Those of [0, end] at which v is an exact combination of z and what such a network predicts: |sin(theta - phi)| >= LEAST."""
    says = parameterization(prediction)
    if says.slope == 1:
        return 0.0, end
    singular, reach = says.quarters * math.pi / 2 / (1 - says.slope), math.asin(LEAST) / (1 - says.slope)
    return (singular + reach, end) if singular <= 0 else (0.0, min(singular - reach, end))


def coefficients(prediction: Prediction, phi: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), [N] and [N, P], of v = a z + sum_p b_p o_p, for the outputs o of a network of that prediction."""
    return conversion_coefficients(prediction, "v", phi, LEAST)


class Converted(Network):
    """`network(z, phi, cond) -> v` of a network inside."""

    def __init__(self, config: ConvertedConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        self.network: Network = config.network.build(dropout)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.network.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.network.dtype = dtype

    def blocks(self) -> Iterator[nn.Module]:
        return self.network.blocks()

    def forward(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor:
        a, b = coefficients(self.network.prediction, phi)
        outputs = self.network(z, phi, cond).chunk(b.shape[1], dim=1)
        v = a.view(-1, 1, 1, 1) * z.float()
        for i, output in enumerate(outputs):
            v = v + b[:, i].view(-1, 1, 1, 1) * output
        return v
