"""Philox4x32-10 against its published vectors, and against an implementation in plain Python integers."""

import math

import numpy as np
import pytest
import torch

from pdfast_kernels.random import philox

MASK = 0xFFFFFFFF


def plain_philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def plain_integer(seed, stream, round_index, update, index, element):
    words = plain_philox((element // 4, index, update, stream << 16 | round_index), (seed & MASK, seed >> 32))
    return words[element % 4]


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    """kat_vectors of Random123."""
    words = philox.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


@pytest.mark.filterwarnings("ignore")  # of the compiler's, about itself
def test_compiled_for_a_cpu():
    """No product leaves int64, which a compiler takes for granted."""
    compiled, index = torch.compile(philox.integers_from_key, fullgraph=True, dynamic=False), torch.arange(16)
    for update in range(8):
        key = torch.tensor(philox.key_words(0, 1, 1, update))
        assert torch.equal(compiled(key, index, 1), philox.integers_from_key(key, index, 1))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 + 12345, 2**64 - 1])
def test_integers_and_their_counters(seed):
    index = torch.tensor([0, 1, 77, 2**31 + 5, 2**32 - 1])
    ours = philox.integers(seed, 65535, 3, 2**32 - 1, index, 7)
    assert ours.shape == (5, 7) and ours.dtype == torch.int64
    for row, i in enumerate(index.tolist()):
        for element in range(7):
            assert int(ours[row, element]) == plain_integer(seed, 65535, 3, 2**32 - 1, i, element)


def test_normals_are_box_muller():
    index = torch.arange(500)
    words = philox.integers(9, 1, 2, 3, index, 64).numpy().astype(np.float64).reshape(500, 16, 2, 2)
    radius = np.sqrt(-2 * np.log(words[..., 0] / 2**32 + 2.0**-33))
    angle = words[..., 1] * (2 * math.pi / 2**32)
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(500, 64)
    ours = philox.normals(9, 1, 2, 3, index, 64)
    assert ours.dtype == torch.float32
    # Where the uniform number is close to 1 its float32 rounding is seen through the root: a few 1e-4 at most there.
    close = np.abs(ours.numpy() - expected) < 2e-6 * np.maximum(1, radius.repeat(2, -1).reshape(500, 64))
    assert close[radius.repeat(2, -1).reshape(500, 64) > 0.1].all()
    assert np.abs(ours.numpy() - expected).max() < 1e-3


def test_a_count_not_divisible_by_four_is_a_prefix():
    index = torch.arange(3)
    assert torch.equal(philox.normals(0, 0, 0, 0, index, 5), philox.normals(0, 0, 0, 0, index, 64)[:, :5])


@pytest.mark.parametrize(
    "fields", [(-1, 0, 0, 0), (2**64, 0, 0, 0), (0, 2**16, 0, 0), (0, 0, 2**16, 0), (0, 0, 0, 2**32)]
)
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError):
        philox.integers(*fields, torch.arange(2), 4)
