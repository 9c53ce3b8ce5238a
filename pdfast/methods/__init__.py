"""What the loop trains: a teacher, a v-predicting copy of one, a student of fewer steps. One file a method."""

from collections.abc import Callable

from pdfast.config import DistillConfig
from pdfast.methods.denoise import Denoise
from pdfast.methods.distillation import Distillation, Networks, RoundTable
from pdfast.methods.kept import KeptProgressive, Pairs
from pdfast.methods.progressive import Progressive
from pdfast.methods.reparameterize import Reparameterize
from pdfast.methods.tract import Tract
from pdfast.rounds import MethodName

METHODS: dict[MethodName, type[Distillation]] = {"progressive": Progressive, "tract": Tract, "pairs": Pairs}
"""Methods of distillation by their names in a configuration."""


MethodOfRound = Callable[[DistillConfig, int], type[Distillation]]
"""Returns the method of the round to a step count."""


def method_of_round(config: DistillConfig, steps: int) -> type[Distillation]:
    """Return the method of the round to so many steps."""
    method = METHODS[config.method_at(steps)]
    return KeptProgressive if method is Progressive and config.kept.reuse > 1 else method


__all__ = [
    "METHODS",
    "Denoise",
    "Distillation",
    "MethodOfRound",
    "KeptProgressive",
    "Networks",
    "Pairs",
    "Progressive",
    "Reparameterize",
    "RoundTable",
    "Tract",
    "method_of_round",
]
