"""Classifier-free guidance (Ho & Salimans 2022) as a network around another, and what a student that has it inside begins with.

    o = o_uncond + g (o_cond - o_uncond)

in one call on the doubled batch, for any parameterization, since it is linear. g is 1 for no guidance and 0 for no condition, as
`guidance_scale` of diffusers; Meng et al. 2023 and latent consistency models count w = g - 1.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pdfast.diffusion import Prediction, join_conditions
from pdfast.networks.network import ModelConfig, Network, WrapperConfig
from pdfast.networks.wrapped import Wrapped, Wrapping
from pdfast_kernels import ddim_step

INPUT = "guidance"
"""The module, in a network that takes g as an input, whose output stands beside the noise level's."""


@dataclass(frozen=True)
class GuidedConfig(WrapperConfig):
    """A network that is guided."""

    network: ModelConfig
    """The configuration of the one inside."""
    guidance: tuple[float, ...] = ()
    """g; or its least and largest value, and then it is a part of the condition."""
    kind: str = "guided"

    def __post_init__(self) -> None:
        if self.network.null_label is None:
            raise ValueError("guidance needs a network that can be told no class, and this one knows no such label")
        if len(self.guidance) not in (1, 2) or not 0 <= self.guidance[0] <= self.guidance[-1]:
            raise ValueError(f"guidance must be a number from 0 on, or the least and the largest, got {self.guidance}")

    @property
    def prediction(self) -> Prediction:  # type: ignore[override]
        return self.network.prediction

    def condition(self, cond: Any, guidance: Tensor | None = None) -> Any:
        return ModelConfig.condition(self, cond, guidance)

    def draw_condition(self, seed: int, index: Tensor) -> Any:
        return ModelConfig.draw_condition(self, seed, index)

    def changed(self, **fields: Any) -> "GuidedConfig":
        return replace(self, **fields)

    def build(self, dropout: float = 0.0) -> "Guided":
        return Guided(self, self.network.build(dropout))


class Guided(Wrapped):
    """`network(z, phi, cond) -> o` of a network inside that is asked twice: with the condition, and with no class in its place."""

    config: GuidedConfig

    def __init__(self, config: GuidedConfig, inner: Network) -> None:
        super().__init__(config, inner, Wrapping())

    def forward(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor:
        config = self.config.network
        if len(self.config.guidance) == 2:
            cond, g = cond["label"], cond["guidance"].float()
        else:
            g = torch.full_like(phi, self.config.guidance[0], dtype=torch.float32)
        theirs = config.condition(cond, g)
        dropped = config.drop(theirs, torch.ones_like(phi, dtype=torch.bool))
        both = self.inner(torch.cat([z, z]), torch.cat([phi, phi]), join_conditions(theirs, dropped))
        conditional, unconditional = both.chunk(2)
        return ddim_step(unconditional, conditional, 1 - g, g[:, None])


def in_range(guidance: tuple[float, ...]) -> str:
    """Say which guidance that is."""
    return " to ".join(f"{g:g}" for g in guidance)


def start_of(student: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a student of that configuration begins with, of those of its teacher, without guidance around it: the same,
    and where it takes g as an input and its teacher does not, zeros for that."""
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in student.build().named_parameters()}
    added = {n: torch.zeros(shape) for n, shape in names.items() if n not in weights and INPUT in n.split(".")[:-1]}
    return {**weights, **added}


def at_guidance(network: Network, g: float) -> Network:
    """Return the network asked at guidance g, with the same weights in the same memory: guided by it, or, where g is a part of its condition,
    always told that. ValueError where it cannot be, or has another guidance inside."""
    config = network.config
    inside = config.guidance
    if not inside:
        return network if g == 1 else Guided(GuidedConfig(config, (g,)), network)
    if not inside[0] <= g <= inside[-1]:
        way = "choose one within" if len(inside) == 2 else "leave it out"
        raise ValueError(f"it has guidance of {in_range(inside)} inside: {way}")
    if len(inside) == 2:
        network = copy(network)
        network.config = config.changed(guidance=(g, g))
    return network
