"""Philox4x32-10 (Salmon et al., SC 2011): random numbers that are a function of their place, not of a state.

The key is the seed. The counter is (stream, round, update, index in the global batch, element), packed as

    word 0   element // 4          word 2   update
    word 1   index                 word 3   stream << 16 | round

and element e takes output word e % 4. Nothing depends on rank, world size, device or on how often a run stopped.
Integers are bit-equal on every device; normals agree to 1e-6.
"""

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK, _HALF = 0xFFFFFFFF, 0x80000000


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of `word` times an odd 32-bit factor.

    Without the top bit of `word`, or the product would leave int64: what that gives is not defined in compiled code.
    """
    product = (word - _HALF) * factor + _HALF
    return (product >> 32) + (factor >> 1), product & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    counter: four int64 tensors of one broadcastable shape, values in [0, 2**32). key: two integers in [0, 2**32),
    or int64 tensors of no dimension.
    Returns four int64 tensors, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _M0), _product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def key_words(seed: int, stream: int, round_index: int, update: int) -> tuple[int, int, int, int]:
    """Return what the numbers of an update have in common: both words of the key, and words 2 and 3 of the counter.

    ValueError for a field that does not fit its words.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if not (0 <= stream < 1 << 16 and 0 <= round_index < 1 << 16 and 0 <= update < 1 << 32):
        raise ValueError(f"stream {stream}, round {round_index} or update {update} does not fit its counter field")
    return seed & _MASK, seed >> 32, update, stream << 16 | round_index


def _words(key: tuple[int, int, int, int] | Tensor, index: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Four int64 tensors [n, groups]: all output words of the samples `index` [n]."""
    key0, key1, word2, word3 = key
    group = torch.arange(groups, device=index.device)[None, :]
    sample = index[:, None]
    constant = torch.zeros((), dtype=torch.int64, device=index.device)
    words = philox4x32((group, sample, constant + word2, constant + word3), (key0, key1))
    return tuple(w.expand(index.shape[0], groups) for w in words)


def integers(seed: int, stream: int, round_index: int, update: int, index: Tensor, count: int) -> Tensor:
    """Return uniform integers in [0, 2**32): int64 [n, count] for the int64 sample indices `index` [n]."""
    return integers_from_key(key_words(seed, stream, round_index, update), index, count)


def integers_from_key(key: tuple[int, int, int, int] | Tensor, index: Tensor, count: int) -> Tensor:
    """`integers` for the words of `key_words`: four integers, or an int64 tensor [4] on the device of `index`."""
    words = _words(key, index, (count + 3) // 4)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def normals(seed: int, stream: int, round_index: int, update: int, index: Tensor, count: int) -> Tensor:
    """Standard normals: float32 [n, count], by Box-Muller on the word pairs (0, 1) and (2, 3)."""
    return normals_from_key(key_words(seed, stream, round_index, update), index, count)


def normals_from_key(key: tuple[int, int, int, int] | Tensor, index: Tensor, count: int) -> Tensor:
    """`normals` for the words of `key_words`: four integers, or an int64 tensor [4] on the device of `index`."""
    words = _words(key, index, (count + 3) // 4)
    pairs = []
    for radius_word, angle_word in (words[:2], words[2:]):
        uniform = radius_word.float() * 2.0**-32 + 2.0**-33  # in (0, 1]: the logarithm is finite
        radius = torch.sqrt(-2.0 * torch.log(uniform))
        angle = angle_word.float() * (2.0 * math.pi * 2.0**-32)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]
