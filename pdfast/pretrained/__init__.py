"""Adapters that give pretrained networks, and networks made of networks, the call `network(z, phi, cond)`."""

from typing import Any

from pdfast.io.errors import UsageError
from pdfast.io.plain import structure
from pdfast.io.reading import shown
from pdfast.networks import ModelConfig, NetworkConfig
from pdfast.networks.converted import ConvertedConfig
from pdfast.networks.guided import GuidedConfig
from pdfast.pretrained.diffusers import DiffusersConfig, DiffusersNetwork, adapt, is_pipeline, load_pipeline
from pdfast.pretrained.edm import EDMConfig, load_edm
from pdfast.pretrained.module import ModuleConfig, load_function

__all__ = [
    "NETWORK_KINDS",
    "ConvertedConfig",
    "DiffusersConfig",
    "DiffusersNetwork",
    "EDMConfig",
    "ModuleConfig",
    "adapt",
    "is_pipeline",
    "load_edm",
    "load_function",
    "load_pipeline",
    "network_config",
]

NETWORK_KINDS: dict[str | None, type[ModelConfig]] = {
    None: NetworkConfig,
    "diffusers": DiffusersConfig,
    "edm": EDMConfig,
    "converted": ConvertedConfig,
    "guided": GuidedConfig,
    "module": ModuleConfig,
}
"""The union of the configurations of networks, by what their field `kind` says in a file; a further kind is a line here."""


def network_config(plain: Any, where: str) -> ModelConfig:
    """Return the configuration of a network from plain data: the inverse of `pdfast.io.plain.unstructure`. UsageError where it is none."""
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(kind, str | None) or kind not in NETWORK_KINDS:
        raise UsageError(f"{where}: unknown kind of network {shown(kind)}")
    return structure(NETWORK_KINDS[kind], plain, where, {ModelConfig: network_config}).checked(where)
