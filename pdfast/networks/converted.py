"""A v-predicting copy of a network that predicts eps or x, which can then be distilled to one step.

    v = (eps - sin z) / cos        v = (cos z - x) / sin

The first divides by 0 at the start of sampling, the second at its end. There the divisor is kept at LEAST instead: the
copy is exact wherever it is not, continuous everywhere, and what it has to learn is small.
"""

import math
from dataclasses import dataclass

from pdfast.diffusion import Prediction, parameterization
from pdfast.networks import ModelConfig, Wrapped, WrapperConfig
from pdfast.networks.wrapped import Wrapping, conversion

LEAST = 0.1


@dataclass(frozen=True)
class ConvertedConfig(WrapperConfig):
    """A network made to predict v."""

    network: ModelConfig
    """The configuration of the one inside."""
    kind: str = "converted"
    prediction: Prediction = "v"

    def __post_init__(self) -> None:
        if self.network.prediction == "v":
            raise ValueError("its network predicts v already: there is nothing to convert")
        if self.prediction != "v":
            raise ValueError(f"a converted network predicts v, not {self.prediction}")

    def build(self, dropout: float = 0.0) -> Wrapped:
        return Wrapped(self, self.network.build(dropout), as_v(self.network.prediction))


def regular_angles(prediction: Prediction, end: float) -> tuple[float, float]:
    """Return those of [0, end] at which v is an exact combination of z and what such a network predicts: |sin(theta - phi)|
    >= LEAST."""
    says = parameterization(prediction)
    if says.slope == 1:
        return 0.0, end
    singular, reach = says.quarters * math.pi / 2 / (1 - says.slope), math.asin(LEAST) / (1 - says.slope)
    return (singular + reach, end) if singular <= 0 else (0.0, min(singular - reach, end))


def as_v(prediction: Prediction) -> Wrapping:
    """Read a network of that prediction as one of v."""
    return conversion(prediction, "v", LEAST)
