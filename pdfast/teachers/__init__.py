"""Networks of others, and networks made of networks, with our call and a `prediction` that says what they put out.

Each kind has a configuration, plain data, with `image_size`, `image_channels`, `image_shape`, `num_classes`, `prediction`,
and `build(dropout=0.0)`.
"""

from typing import Any

from pdfast.config import from_plain
from pdfast.errors import UsageError
from pdfast.networks import NetworkConfig
from pdfast.reading import shown
from pdfast.teachers.convert import ConvertedConfig
from pdfast.teachers.diffusers import DiffusersConfig, DiffusersNetwork, adapt, check_config, is_pipeline, load_pipeline
from pdfast.teachers.edm import EDMConfig, load_edm

__all__ = [
    "AnyNetworkConfig",
    "ConvertedConfig",
    "DiffusersConfig",
    "DiffusersNetwork",
    "EDMConfig",
    "adapt",
    "is_pipeline",
    "load_edm",
    "load_pipeline",
    "network_config",
]

AnyNetworkConfig = NetworkConfig | DiffusersConfig | EDMConfig | ConvertedConfig


def network_config(plain: Any, where: str) -> AnyNetworkConfig:
    """The inverse of `pdfast.config.to_plain` for the configuration of a network. UsageError where it is none."""
    kind = plain.get("kind") if isinstance(plain, dict) else None
    match kind:
        case None:
            return from_plain(NetworkConfig, plain, where)
        case "diffusers":
            return check_config(from_plain(DiffusersConfig, plain, where), where)
        case "edm":
            return from_plain(EDMConfig, plain, where)
        case "converted":
            inner = plain.get("network")
            if isinstance(inner, dict) and inner.get("kind") != "converted" and plain.get("prediction", "v") == "v":
                return ConvertedConfig(network_config(inner, where))
            raise UsageError(f"{where}: a converted network has another within, and predicts v")
    raise UsageError(f"{where}: unknown kind of network {shown(kind)}")
