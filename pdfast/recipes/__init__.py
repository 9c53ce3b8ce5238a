"""One file a reproducible result, by the name that --preset takes. Those of Salimans & Ho 2022 have the networks and settings of the
paper, their parameter counts those of the authors' networks.
"""

from pdfast.config import DistillConfig
from pdfast.io.errors import UsageError
from pdfast.io.reading import shown
from pdfast.recipes.cifar10 import CIFAR10
from pdfast.recipes.cifar10_fast import CIFAR10_FAST
from pdfast.recipes.digits import DIGITS
from pdfast.recipes.fashion import FASHION
from pdfast.recipes.imagenet64 import IMAGENET64
from pdfast.recipes.lsun128 import LSUN128

PRESETS = {config.preset: config for config in (DIGITS, FASHION, CIFAR10_FAST, CIFAR10, IMAGENET64, LSUN128)}


def preset(name: str) -> DistillConfig:
    """Return the preset of that name. UsageError for an unknown one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"unknown preset {shown(name)}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
