"""A run's random numbers: their layout, independence of batches, and distribution."""

import pytest
import torch
from scipy import stats

from pdfast.diffusion import noise
from pdfast.diffusion.noise import Stream
from pdfast_kernels.random import philox


def test_normal_counts_elements_channels_last():
    index = torch.tensor([5, 9])
    eps = noise.normal(noise.key(3, Stream.NOISE, 1, 2), index, (3, 4, 5))
    flat = philox.normals(3, Stream.NOISE, 1, 2, index, 60)
    assert eps.shape == (2, 3, 4, 5) and eps.is_contiguous(memory_format=torch.channels_last)
    assert eps[1, 2, 3, 1] == flat[1, (3 * 5 + 1) * 3 + 2]


def test_a_sample_does_not_depend_on_its_batch():
    whole = noise.normal(noise.key(0, Stream.NOISE, 0, 7), torch.arange(8), (1, 8, 8))
    halves = [noise.normal(noise.key(0, Stream.NOISE, 0, 7), part, (1, 8, 8)) for part in torch.arange(8).split(4)]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["seed", "stream", "round", "update"])
def test_fields_give_other_numbers(change):
    fields = {"seed": 0, "stream": Stream.NOISE, "round": 0, "update": 0}
    other = fields | {change: 1}
    a, b = (noise.normal(noise.key(*f.values()), torch.arange(64), (1, 8, 8)).flatten() for f in (fields, other))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.06


def test_distributions():
    index = torch.arange(4000)
    assert (
        stats.kstest(noise.normal(noise.key(1, Stream.NOISE, 0, 0), index, (1, 4, 4)).flatten().numpy(), "norm").pvalue
        > 1e-3
    )
    assert stats.kstest(noise.uniform(noise.key(1, Stream.TIME, 0, 0), index).numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount(noise.integer(noise.key(1, Stream.TIME, 0, 0), index, 5), minlength=5)
    assert len(counts) == 5 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_uniform_is_strictly_inside():
    u = noise.uniform(noise.key(0, Stream.TIME, 0, 0), torch.arange(10000))
    assert u.dtype == torch.float64 and 0 < u.min() and u.max() < 1


def test_permutations():
    first = noise.permutation(4, 0, 1797)
    assert torch.equal(first.sort().values, torch.arange(1797))
    assert not torch.equal(first, noise.permutation(4, 1, 1797)) and not torch.equal(
        first, noise.permutation(5, 0, 1797)
    )
    noise.permutation.cache_clear()
    assert torch.equal(first, noise.permutation(4, 0, 1797))
