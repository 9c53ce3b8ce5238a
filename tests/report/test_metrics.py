"""The metrics against closed forms and an independent float64 computation."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from pdfast.engine.world import World
from pdfast.errors import UsageError
from pdfast.report.metrics import FrechetDistance, channel_statistics, mean_squared_distance, psnr, split_real

ALONE = World(torch.device("cpu"))


class Pixels(nn.Module):
    """The feature space of the pixels themselves."""

    name = "FD-pixels"

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def correlated_images(n: int, seed: int, mean: float = 128.0) -> Tensor:
    """uint8 [n, 1, 8, 8], far from the ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed + 100)) * 2
    values = torch.randn(n, 64, generator=generator) @ mix
    return (values + mean).round().clamp(0, 255).to(torch.uint8).view(n, 1, 8, 8)


def frechet(a: Tensor, b: Tensor) -> float:
    x, y = (images.flatten(1).numpy().astype(np.float64) for images in (a, b))
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root.real))


def test_frechet_distance_agrees_with_a_float64_matrix_square_root():
    real, other, fewer = correlated_images(500, 0), correlated_images(500, 1, mean=120.0), correlated_images(333, 2)
    distance = FrechetDistance(Pixels(64), real, ALONE, batch_size=128)
    # The second value is right only if the sums of the first were dropped and those of the real images kept.
    assert distance.distance(other) == pytest.approx(frechet(real, other), rel=1e-6)
    assert distance.distance(fewer) == pytest.approx(frechet(real, fewer), rel=1e-6)


def test_frechet_distance_does_not_depend_on_the_batch_size():
    real, other = correlated_images(300, 0), correlated_images(300, 1)
    values = [FrechetDistance(Pixels(64), real, ALONE, batch_size=size).distance(other) for size in (7, 300)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_frechet_distance_of_images_to_themselves_is_zero():
    real = correlated_images(500, 0)
    scale = float(real.flatten(1).double().var(0).sum())
    assert abs(FrechetDistance(Pixels(64), real, ALONE).distance(real.flip(0))) < 1e-6 * scale


def test_frechet_distance_of_a_shift_and_of_a_stretch():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(40, 60, (1000, 3, 2, 2), generator=generator)
    distance = FrechetDistance(Pixels(12), values.to(torch.uint8), ALONE)
    assert distance.distance((values + 7).to(torch.uint8)) == pytest.approx(12 * 7**2, rel=1e-6)
    x = values.flatten(1).double()
    # Twice the deviation: (2 - 1)^2 of each variance, and the mean moves by itself.
    expected = float(x.var(0).sum() + x.mean(0).square().sum())
    assert distance.distance((2 * values).to(torch.uint8)) == pytest.approx(expected, rel=1e-6)


def test_too_few_images_for_the_features_warn():
    with pytest.warns(UserWarning, match=r"64 images are too few for the 64 features of FD-pixels"):
        FrechetDistance(Pixels(64), correlated_images(64, 0), ALONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrechetDistance(Pixels(64), correlated_images(65, 0), ALONE).distance(correlated_images(65, 1))


def test_a_distance_waits_for_no_other_process(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a collective in a measurement of one process")

    distance = FrechetDistance(Pixels(64), correlated_images(100, 0), ALONE)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for name in ("all_gather", "barrier"):
            monkeypatch.setattr(torch.distributed, name, refuse)
        assert distance.distance(correlated_images(100, 1)) > 0
    finally:
        monkeypatch.undo()
        torch.distributed.destroy_process_group()


def test_split_real_is_disjoint_and_depends_on_the_seed_alone():
    a, b = split_real(1797, 898, seed=0)
    assert a.dtype == b.dtype == torch.int64
    assert len(a) == len(b) == 898
    both = torch.cat([a, b])
    assert both.unique().numel() == 2 * 898
    assert both.min() >= 0 and both.max() < 1797
    assert all(map(torch.equal, (a, b), split_real(1797, 898, seed=0)))
    assert not torch.equal(a, split_real(1797, 898, seed=1)[0])
    assert not torch.equal(a, torch.arange(898))


def test_split_real_of_too_few_images_says_how_many_there_can_be():
    with pytest.raises(UsageError, match=r"--evaluation.num-samples to at most 898$") as caught:
        split_real(1797, 899, seed=0)
    assert "\n" not in str(caught.value)


def test_mean_squared_distance_is_in_units_of_the_range_of_the_network():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = torch.full_like(a, 255)
    assert mean_squared_distance(a, b) == pytest.approx(4.0)
    assert mean_squared_distance(b, a) == pytest.approx(4.0)
    b[1] = 0
    assert mean_squared_distance(a, b) == pytest.approx(2.0)


def test_psnr_in_decibels():
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert psnr(a, a + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(a, a - 10) == pytest.approx(20 * math.log10(25.5))
    assert psnr(a, a.clone()) == math.inf


def test_channel_statistics_in_the_unit_range():
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 2
    mean, std = channel_statistics(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-12)
