"""The gradients of replicas: averaged by one collective, in one buffer.

A small network spends more time on a collective for each block than on what it moves. The host waits for nothing here, and
addresses stay, as a CUDA graph needs it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNED = 4  # elements, 16 bytes: each gradient begins at a multiple, for wide loads


class FlatGradient:
    """A buffer for the gradients, float32, of parameters like those given, and for the loss."""

    def __init__(self, parameters: Sequence[Tensor], processes: int) -> None:
        self._processes = processes
        sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters]
        self._all = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
        pieces = self._all[:-1].split(sizes)
        self._gradients = [piece[: p.numel()].view_as(p) for p, piece in zip(parameters, pieces, strict=True)]

    def average(self, gradients: list[Tensor], loss: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the means over all processes of the gradients and of the loss, until the next call; equal bits on all of them.

        Where one is not finite on some process, its mean is not.
        """
        torch._foreach_copy_(self._gradients, gradients)
        self._all[-1].copy_(loss)
        self._all.div_(self._processes)
        dist.all_reduce(self._all)
        return self._gradients, self._all[-1]
