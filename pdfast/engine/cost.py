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

    teacher_forwards: float
    """Forwards without a gradient, in the mean: less than one where what they say serves several updates."""
    fast_average: bool = False
    """Whether an EMA of the student is evaluated too, and kept beside it."""
    kept_targets: int = 0
    """Targets that are made ahead and kept, of all processes."""
    tensors_a_target: int = 2
    """Tensors of an image's shape that each of them keeps."""

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is kept beside the student."""
        return self.teacher_forwards > 0 or self.kept_targets > 0

    @property
    def evaluations(self) -> float:
        """Forwards in all: the student has one."""
        return self.teacher_forwards + 1

    @property
    def flops(self) -> float:
        """Forwards' worth of floating-point operations: the student's backward takes two."""
        return self.evaluations + 2
