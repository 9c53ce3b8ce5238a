"""The metrics against closed forms and an independent float64 computation."""

import math
import tracemalloc
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdfast.data import split
from pdfast.engine.world import World
from pdfast.evaluation import metrics
from pdfast.evaluation.metrics import (
    Comparison,
    FrechetDistance,
    channel_statistics,
    classifier_score,
    features_of,
    in_words,
    kernel_distance,
    mean_squared_distance,
    names_in,
    precision_and_recall,
    psnr,
    split_real,
)
from pdfast.io.errors import UsageError


def pixels(images: Tensor) -> Tensor:
    """The feature space of the pixels themselves."""
    return images.flatten(1).float()


def points(n: int, seed: int, d: int = 5, shift: float = 0.0) -> Tensor:
    """float32 [n, d]"""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture
def untouched():
    """The global generator is where it was, and what it was at plays no part."""
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


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
    real, other, fewer = correlated_images(1500, 0), correlated_images(500, 1, mean=120.0), correlated_images(333, 2)
    distance = FrechetDistance(pixels(real))
    # The second value is right only if the sums of the first were dropped and those of the real images kept.
    assert distance.distance(pixels(other)) == pytest.approx(frechet(real, other), rel=1e-6)
    assert distance.distance(pixels(fewer)) == pytest.approx(frechet(real, fewer), rel=1e-6)


@pytest.mark.parametrize("n, batch_size, processes", [(300, 7, 1), (300, 300, 1), (10, 4, 4), (5, 2, 4)])
def test_features_are_computed_in_parts_and_batches(n, batch_size, processes, monkeypatch):
    """Of all images once, whatever is past the end of the last processes' parts."""
    images, sizes = correlated_images(n, 0), []

    def space(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return pixels(batch)

    gathered = []
    monkeypatch.setattr(World, "gather", lambda world, values: gathered.append(values) or torch.cat(gathered))
    for rank in range(processes):
        features = features_of(space, images, World(torch.device("cpu"), rank, processes), batch_size)
    assert torch.equal(features, pixels(images))
    assert max(sizes) <= batch_size and len({len(values) for values in gathered}) == 1


def test_frechet_distance_of_images_to_themselves_is_zero():
    real = correlated_images(500, 0)
    scale = float(real.flatten(1).double().var(0).sum())
    assert 0 <= FrechetDistance(pixels(real)).distance(pixels(real.flip(0))) < 1e-6 * scale


def test_frechet_distance_of_a_shift_and_of_a_stretch():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(40, 60, (1000, 3, 2, 2), generator=generator)
    distance = FrechetDistance(pixels(values))
    assert distance.distance(pixels(values + 7)) == pytest.approx(12 * 7**2, rel=1e-6)
    x = values.flatten(1).double()
    # Twice the deviation: (2 - 1)^2 of each variance, and the mean moves by itself.
    expected = float(x.var(0).sum() + x.mean(0).square().sum())
    assert distance.distance(pixels(2 * values)) == pytest.approx(expected, rel=1e-6)


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return (float(np.dot(a, b)) / len(a) + 1) ** 3


def mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, equation 4 of arXiv 1801.01401, pair by pair."""
    x, y = x.double().numpy(), y.double().numpy()
    n = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a, b in product(x, y)) / n**2


def test_kernel_distance_of_few_is_that_of_all_at_once(untouched):
    real, other = points(60, 0), points(60, 1, shift=0.3)
    mean, std = kernel_distance(real, other)
    assert mean == pytest.approx(mmd(real, other), rel=1e-9) and std is None


def test_kernel_distance_of_many_is_over_the_same_subsets_every_time(untouched, monkeypatch):
    monkeypatch.setattr(metrics, "SUBSETS", 4)
    monkeypatch.setattr(metrics, "SUBSET_SIZE", 20)
    real, other = points(70, 0), points(50, 1, shift=0.3)
    generator = torch.Generator().manual_seed(0)
    drawn = [[f[torch.randperm(len(f), generator=generator)[:20]] for f in (real, other)] for _ in range(4)]
    expected = [mmd(*subsets) for subsets in drawn]
    mean, std = kernel_distance(real, other)
    assert mean == pytest.approx(np.mean(expected), rel=1e-9) and std == pytest.approx(np.std(expected), rel=1e-9)
    torch.rand(5)
    assert kernel_distance(real, other) == (mean, std)
    torch.manual_seed(1234)


def test_classifier_score_is_that_of_its_definition(untouched):
    logits = points(205, 0, d=7) * 2
    order = torch.randperm(205, generator=torch.Generator().manual_seed(0))
    expected = []
    for part in logits[order].double().chunk(10):
        p = scipy.special.softmax(part.numpy(), axis=1)
        expected.append(np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])))
    mean, std = classifier_score(logits)
    assert mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert std == pytest.approx(np.std(expected, ddof=1), rel=1e-9)
    torch.rand(5)
    assert classifier_score(logits) == (mean, std)
    torch.manual_seed(1234)


def test_classifier_score_is_1_of_one_kind_and_the_classes_of_all(monkeypatch):
    assert classifier_score(points(1, 0).expand(50, 5)) == pytest.approx((1, 0))
    monkeypatch.setattr(metrics, "SPLITS", 1)
    sure = 300 * torch.eye(5).repeat(
        20, 1
    )  # in float32 the others' probabilities would be 0, and the score not a number
    with pytest.warns(UserWarning, match="degrees of freedom"):  # of one part
        assert classifier_score(sure)[0] == pytest.approx(5)


def within(candidates: np.ndarray, others: np.ndarray, k: int) -> float:
    """The fraction of the candidates within some other's distance to its k-th nearest: equation 1 of arXiv 1904.06991."""
    radii = [sorted(np.linalg.norm(o - p) for j, p in enumerate(others) if j != i)[k - 1] for i, o in enumerate(others)]
    return np.mean([any(np.linalg.norm(c - o) <= r for o, r in zip(others, radii, strict=True)) for c in candidates])


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_their_definition(block, k, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, other = points(60, 0, shift=100), 1.3 * points(45, 1, shift=0.5) + 100
    x, y = real.double().numpy(), other.double().numpy()
    expected = within(y, x, k), within(x, y, k)
    assert precision_and_recall(real, other, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]


def test_precision_and_recall_of_what_they_mean():
    real = points(200, 0)
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, points(200, 1, shift=100)) == (0, 0)
    precision, recall = precision_and_recall(real, 0.05 * points(200, 1))
    assert precision == 1 and recall < 0.05, "good images, all of a kind"
    precision, recall = precision_and_recall(real, 3 * points(200, 1))
    assert precision < 0.5 and recall > 0.9, "images of all kinds, many of them bad"
    assert precision_and_recall(real[:3], real) == (None, None)


class Pixels(nn.Module):
    """The pixels, and four of them as logits."""

    num_features = 64

    def logits(self, features: Tensor) -> Tensor:
        return features[:, :4] / 10


def test_a_comparison_has_all_figures_of_the_same_features():
    real, other = (pixels(correlated_images(100, seed)) for seed in (0, 1))
    figures = Comparison(Pixels(), real).figures(other)
    kd, kd_std = kernel_distance(real, other)
    cs, cs_std = classifier_score(other[:, :4] / 10)
    precision, recall = precision_and_recall(real, other)
    fd = FrechetDistance(real).distance(other)
    assert figures == pytest.approx(
        {"fd": fd, "kd": kd, "kd_std": kd_std, "cs": cs, "cs_std": cs_std, "precision": precision, "recall": recall}
    )
    assert fd > 0 and cs > 1 and kd_std is None


def test_a_comparison_waits_for_no_other_process(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a collective in a measurement of one process")

    comparison = Comparison(Pixels(), pixels(correlated_images(100, 0)))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for name in ("all_gather", "barrier"):
            monkeypatch.setattr(torch.distributed, name, refuse)
        assert comparison.figures(pixels(correlated_images(100, 1)))["fd"] > 0
    finally:
        monkeypatch.undo()
        torch.distributed.destroy_process_group()


def test_only_inceptions_figures_have_their_names():
    assert names_in("FID") == {"fd": "FID", "kd": "KID", "cs": "IS"}
    assert names_in("FD-digits") == {"fd": "FD-digits", "kd": "KD-digits", "cs": "CS-digits"}
    assert names_in("FD-Inception")["kd"] == "KD-Inception"


def test_figures_in_words():
    assert [in_words(None), in_words(0.9), in_words(0.00123456, 0.000234)] == ["–", "0.9", "0.001235 ± 0.00023"]


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


def test_all_images_as_the_reference_leave_none_for_a_floor():
    everything, none = split_real(1797, 5000, seed=0, reference="all")
    assert torch.equal(everything.sort().values, torch.arange(1797)) and none.tolist() == []


def test_split_real_of_too_few_images_says_how_many_there_can_be():
    with pytest.raises(
        UsageError, match=r"--evaluation.num-samples to at most 898, or .*--evaluation.reference all$"
    ) as caught:
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


def test_sets_of_images_are_not_copied_into_doubles(monkeypatch):
    """The same figures, to the last bit for distances, without more memory than a few images'."""
    images = torch.randint(0, 256, (2000, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    others = images.flip(0)
    whole, pixels = images.double() / 255, images.double()
    expected = [whole.mean((0, 2, 3)), whole.std((0, 2, 3), correction=0)]
    distance = float((pixels - others.double()).square().mean()) / 127.5**2
    del whole, pixels
    monkeypatch.setattr(split, "COUNTED", 1 << 14)
    sizes = []
    with Sizes(sizes):
        assert mean_squared_distance(images, others) == distance
    tracemalloc.start()
    found = channel_statistics(images)
    assert tracemalloc.get_traced_memory()[1] < images.nbytes / 2
    tracemalloc.stop()
    assert max(sizes) < images.nbytes
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one, dtype=torch.float64), other, rtol=1e-14, atol=0)


class Sizes(TorchDispatchMode):
    """The bytes of each result."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        self.sizes += [result.nbytes] if isinstance(result, torch.Tensor) else []
        return result


def test_channel_statistics_in_the_unit_range():
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 2
    mean, std = channel_statistics(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-12)
