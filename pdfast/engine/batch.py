"""The data and random numbers of each update, and the gradient of a batch in micro-batches.

Every random number is a function of (seed, round, update, index in the global batch): see `pdfast.diffusion.noise`. What an
update reads is in tensors that stay where they are, so that it can be replayed as a CUDA graph.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pdfast.data import Batch, ImageSource
from pdfast.diffusion import noise
from pdfast.diffusion.noise import Stream
from pdfast.engine.parallelize import last_of_batch
from pdfast.engine.world import World
from pdfast_kernels import diffuse

STREAMS = (Stream.NOISE, Stream.TIME, Stream.FLIP)


class TrainingBatch:
    """This process's shard of each update's data and random numbers."""

    def __init__(
        self, source: ImageSource, world: World, *, seed: int, batch_size: int, flip: bool, conditional: bool
    ) -> None:
        """batch_size: images per update on all processes, a multiple of their number."""
        self.world = world
        self._source, self._seed, self._batch_size, self._flip = source, seed, batch_size, flip
        self._part = world.part(batch_size)
        self.index = self._part.to(world.device)
        """Places of this process's samples in the global batch: int64 [n]."""
        count = len(self._part)
        self.images = torch.empty(count, *source.shape, dtype=torch.uint8, device=world.device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=world.device) if conditional else None
        self._stream: Iterator[Batch] = iter(())
        self._loaded: tuple[int, int] | None = None  # round and update
        self._keys = torch.zeros(len(STREAMS), 4, dtype=torch.int64, device=world.device)
        self.waited = 0.0
        """Seconds spent on getting data."""

    def load(self, round_index: int, update: int) -> None:
        """Get the images of an update (round_index 0 is the teacher's training) and the keys of its random numbers."""
        began = time.perf_counter()
        if self._loaded != (round_index, update):
            if self._loaded != (round_index, update - 1):
                seed = self._seed + (round_index << 32)
                self._stream = self._source.stream(self._part, self._batch_size, update, seed)
            batch = next(self._stream)
            self.images.copy_(batch.images, non_blocking=True)
            if self.labels is not None:
                assert batch.labels is not None  # a source without any is refused when it is opened
                self.labels.copy_(batch.labels, non_blocking=True)
            self._loaded = round_index, update
        keys = torch.tensor([noise.key(self._seed, stream, round_index, update) for stream in STREAMS])
        self._keys.copy_(keys if self._keys.device.type == "cpu" else keys.pin_memory(), non_blocking=True)
        self.waited += time.perf_counter() - began

    def key(self, stream: Stream) -> Tensor:
        return self._keys[STREAMS.index(stream)]

    def times(self) -> Tensor:
        """Return diffusion times, uniform in (0, 1): float64 [n]."""
        return noise.uniform(self.key(Stream.TIME), self.index)

    def step_indices(self, rows: Tensor) -> Tensor:
        """Return rows of a step table, uniform in 1..rows: int64 [n]."""
        return 1 + noise.integer(self.key(Stream.TIME), self.index, rows)

    def diffused(self, phi: Tensor) -> Tensor:
        """Return the images, flipped where the random numbers say so, and their noise, at angles phi [n]: float32 [n, C, H, W]."""
        flip = noise.integer(self.key(Stream.FLIP), self.index, 2).bool() if self._flip else None
        return diffuse(self.images, phi, self.key(Stream.NOISE), self.index, flip)


def accumulate_gradient(
    student: nn.Module, losses: Callable[..., Tensor], given: Sequence[Tensor | None], micro_batches: int = 1
) -> Tensor:
    """Add the gradient of the mean loss to the student's parameters, one micro-batch after the other; return the losses, [n].

    given: tensors with the batch first, or None; losses: takes those of one micro-batch and returns its losses.
    """
    all_losses: list[Tensor] = []
    for parts in zip(*(_parts(tensor, micro_batches) for tensor in given), strict=True):
        loss = losses(*parts)
        last_of_batch(student, len(all_losses) == micro_batches - 1)
        (loss.mean() / micro_batches).backward()
        all_losses.append(loss.detach())
    return torch.cat(all_losses)


def _parts(tensor: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if tensor is None else tensor.chunk(count)
