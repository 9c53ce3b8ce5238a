"""What an update costs, counted without running it."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pdfast.networks import Network, NetworkConfig


def inputs(network: NetworkConfig, count: int, device: torch.device | str) -> tuple:
    """Return z, phi and cond of `count` images, zeros."""
    cond = network.condition(torch.zeros(count, dtype=torch.int64, device=device))
    return torch.zeros(count, *network.image_shape, device=device), torch.zeros(count, device=device), cond


def empty_network(network: NetworkConfig) -> Network:
    """Build the network without content, where it runs so."""
    if not network.runs_on_meta:
        return network.build()
    with torch.device("meta"):
        return network.build().to("meta")


def count_parameters(parameters) -> int:
    """Return how many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)


@lru_cache
def parameters_and_flops(network: NetworkConfig) -> tuple[int, int]:
    """Parameters, and floating-point operations of one forward of one image."""
    model = empty_network(network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs(network, 1, "meta" if network.runs_on_meta else "cpu"))
    return count_parameters(model.parameters()), counter.get_total_flops()


@dataclass(frozen=True)
class UpdateCost:
    """What an update costs for each image, in forwards of the network."""

    teacher_forwards: int
    """Forwards without a gradient."""

    @property
    def evaluations(self) -> int:
        """Forwards in all: the student has one."""
        return self.teacher_forwards + 1

    @property
    def flops(self) -> int:
        """Forwards' worth of floating-point operations: the student's backward takes two."""
        return self.evaluations + 2
