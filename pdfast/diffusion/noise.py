"""The random numbers of a run, each a function of (seed, stream, round, update, index in the global batch, element).

The generator is Philox4x32-10 of `pdfast_kernels.random.philox`. A run that is stopped, resumed or spread over more processes
draws the same numbers. Elements of an image are counted in memory order, channels last.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdfast_kernels.random import philox

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64


class Stream(IntEnum):
    """What a random number is for; numbers of different streams are independent."""

    NOISE = 0  # eps of a training sample
    TIME = 1  # step index or diffusion time of a training sample
    FLIP = 2  # horizontal flip of a training sample
    ORDER = 3  # order of the data in an epoch
    SAMPLE = 4  # the noise that sampling starts from
    ANCESTRAL = 5  # noise added by the ancestral sampler; its `update` is the step
    LABEL = 6  # class of a drawn sample
    DROPOUT = 7  # seed of the dropout of an update
    PAIR = 8  # the noise of a pair
    KEPT = 9  # which of the kept targets a sample of an update takes
    DROPPED = 10  # whether a training sample is without its class
    GUIDANCE = 11  # guidance of a training sample, or of a drawn one


Key = tuple[int, int, int, int] | Tensor
"""What the numbers of an update have in common: `key(...)`, or the same as an int64 tensor [4] on the device, which can be
written between the replays of a CUDA graph."""


def key(seed: int, stream: Stream, round_index: int = 0, update: int = 0) -> tuple[int, int, int, int]:
    """seed in [0, 2**64), round_index in [0, 2**16), update in [0, 2**32); ValueError for others."""
    return philox.key_words(seed, stream, round_index, update)


def normal(key: Key, index: Int64[Tensor, "n"], shape: tuple[int, ...]) -> Float32[Tensor, n * s]:
    """Return standard normal noise, float32 [n, *shape], for int64 `index` [n]: with channels-last strides for a shape (C, H, W),
    dense for others."""
    flat = philox.normals_from_key(key, index, math.prod(shape))
    if len(shape) != 3:
        return flat.view(-1, *shape)
    channels, height, width = shape
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)


def uniform(key: Key, index: Int64[Tensor, "n"]) -> Float64[Tensor, "n"]:
    """Return uniform in (0, 1), float64 [n], for int64 `index` [n]."""
    return (philox.integers_from_key(key, index, 1)[:, 0].double() + 0.5) * 2.0**-32


def integer(key: Key, index: Int64[Tensor, "n"], bound: int | Tensor) -> Int64[Tensor, "n"]:
    """Return uniform in {0, ..., bound - 1}, int64 [n]; the bias of one part in 2**32 / bound is left."""
    return (philox.integers_from_key(key, index, 1)[:, 0] * bound) >> 32


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> Int64[Tensor, "size"]:
    """Return the order of epoch `epoch` over `size` images, int64 [size] on the CPU: the argsort of one draw an image."""
    keys = philox.integers(seed, Stream.ORDER, 0, epoch, torch.arange(size), 1)[:, 0]
    return torch.argsort(keys, stable=True)
