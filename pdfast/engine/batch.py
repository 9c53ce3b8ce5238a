"""The data and random numbers of each update, and the gradient of a batch in micro-batches.

Every random number is a function of (seed, round, update, index in the global batch): see `pdfast.diffusion.noise`. What an
update reads is in tensors that stay where they are, so that it can be replayed as a CUDA graph.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pdfast.data import Batch, ImageSource, codec_of
from pdfast.diffusion import map_condition, noise, tensors_of
from pdfast.diffusion.noise import Stream
from pdfast.engine.parallelize import last_of_batch
from pdfast.engine.world import World
from pdfast.networks import ModelConfig

STREAMS = (Stream.NOISE, Stream.TIME, Stream.FLIP, Stream.DROPPED, Stream.GUIDANCE)


class TrainingBatch:
    """This process's shard of each update's data and random numbers."""

    def __init__(
        self, source: ImageSource, world: World, network: ModelConfig, *, seed: int, batch_size: int, flip: bool
    ) -> None:
        """network: what is trained on it. batch_size: samples per update on all processes, a multiple of their number."""
        self.world = world
        self._codec, self._network = codec_of(network), network
        self.seed, self.batch_size = seed, batch_size
        self._source, self._flip = source, flip
        self._part = world.part(batch_size)
        self.index = self._part.to(world.device)
        """Places of this process's samples in the global batch: int64 [n]."""
        self.x: Tensor | None = None
        """The data set's samples; from the first `load` on they, and what comes with them, are in memory that stays."""
        self._cond: Any = None
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
                seed = self.seed + (round_index << 32)
                self._stream = self._source.stream(self._part, self.batch_size, update, seed)
            batch = next(self._stream)
            x, cond = batch.x, batch.cond
            if self.x is None:
                self.x, self._cond = map_condition(self._empty, (x, cond))
            for kept, loaded in zip(tensors_of((self.x, self._cond)), tensors_of((x, cond)), strict=True):
                kept.copy_(loaded, non_blocking=True)
            self._loaded = round_index, update
        self.set_keys(round_index, update)
        self.waited += time.perf_counter() - began

    def set_keys(self, round_index: int, update: int) -> None:
        """Set the keys of an update's random numbers alone, where it needs no images."""
        keys = torch.tensor([noise.key(self.seed, stream, round_index, update) for stream in STREAMS])
        self._keys.copy_(keys if self._keys.device.type == "cpu" else keys.pin_memory(), non_blocking=True)

    @property
    def cond(self) -> Any:
        """The network's condition, a tree of tensors with the batch first."""
        guidance = self._network.draw_guidance(self.key(Stream.GUIDANCE), self.index)
        return self._network.condition(self._cond, guidance)

    def cond_without(self, fraction: float) -> Any:
        """Return the condition, without its class for a fraction of the samples, drawn at random."""
        dropped = noise.uniform(self.key(Stream.DROPPED), self.index) < fraction
        return self._network.drop(self.cond, dropped) if fraction else self.cond

    def key(self, stream: Stream) -> Tensor:
        return self._keys[STREAMS.index(stream)]

    def times(self) -> Tensor:
        """Return diffusion times, uniform in (0, 1): float64 [n]."""
        return noise.uniform(self.key(Stream.TIME), self.index)

    def step_indices(self, rows: Tensor) -> Tensor:
        """Return rows of a step table, uniform in 1..rows: int64 [n]."""
        return 1 + noise.integer(self.key(Stream.TIME), self.index, rows)

    def diffused(self, phi: Tensor) -> Tensor:
        """Return the samples, mirrored where the random numbers say so, and their noise, at angles phi [n]: float32 z [n, ...]."""
        assert self.x is not None
        flip = noise.integer(self.key(Stream.FLIP), self.index, 2).bool() if self._flip else None
        return self._codec.diffuse(self.x, phi, self.key(Stream.NOISE), self.index, flip)

    def _empty(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.world.device, memory_format=torch.contiguous_format)


def _part(i: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(count)[i]


def accumulate_gradient(
    student: nn.Module, losses: Callable[..., Tensor], given: tuple, micro_batches: int = 1
) -> Tensor:
    """Add the gradient of the mean loss to the student's parameters, one micro-batch after the other; return the losses, [n].

    given: trees of tensors with the batch first; losses: takes those of one micro-batch and returns its losses.
    """
    all_losses: list[Tensor] = []
    for i in range(micro_batches):
        loss = losses(*map_condition(_part(i, micro_batches), given))
        last_of_batch(student, i == micro_batches - 1)
        (loss.mean() / micro_batches).backward()
        all_losses.append(loss.detach())
    return torch.cat(all_losses)
