"""Figures of sets of images: distances and scores in a feature space, and distances in pixels."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pdfast.config import Reference
from pdfast.data.split import channel_histogram, moments
from pdfast.diffusion.noise import permutation
from pdfast.engine.world import World
from pdfast.io.errors import UsageError

Figures = dict[str, float | None]
SEED = 0  # of the subsets and splits
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance: Binkowski et al.'s code
SPLITS = 10  # of the classifier score: Salimans et al. 2016
NEIGHBOURS = 3  # of precision and recall: Kynkaanniemi et al. 2019
BLOCK = 1 << 24  # distances held at once
PART = 256  # images compared at once


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Let torch's generator on the CPU begin at `seed`, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        yield


def names_in(space: str) -> dict[str, str]:
    """Return what the Frechet distance, the kernel distance and the classifier score are called in a feature space, by its
    name: FID, KID and IS in that called FID, in any other, FD-X, KD-X and CS-X."""
    if space == "FID":
        return {"fd": "FID", "kd": "KID", "cs": "IS"}
    return {key: key.upper() + space.removeprefix("FD") for key in ("fd", "kd", "cs")}


def in_words(figure: float | None, deviation: float | None = None) -> str:
    """Return a figure to four digits, with its standard deviation to two where there is one; a dash for None."""
    if figure is None:
        return "–"
    return f"{figure:.4g}" if deviation is None else f"{figure:.4g} ± {deviation:.2g}"


def features_of(space: nn.Module, images: Tensor, world: World, batch_size: int = 256) -> Tensor:
    """Return features float32 [n, num_features], on the CPU, of uint8 images [n, C, H, W], the same in all processes, of which
    each computes a part. All processes must call it.

    space: uint8 [n, C, H, W] -> float32 [n, num_features], on the world's device.
    """
    part = world.part(len(images)).clamp(max=len(images) - 1)  # what is past the end is dropped below
    features = [space(batch.to(world.device)).cpu() for batch in images[part].split(batch_size)]
    return world.gather(torch.cat(features))[: len(images)]


class PrecomputedFeatures(nn.Module):
    """Features as they are, where a metric of torchmetrics would compute them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class Comparison:
    """All figures of images against one set of real ones, from features of both in one space.

    torchmetrics computes what it has; all sums are float64. Nothing is exchanged with other processes.
    """

    def __init__(self, space: Any, real: Tensor, device: torch.device | str = "cpu") -> None:
        """space: with `num_features` and `logits`, on the device. real: float32 [n, num_features] on the CPU."""
        self._space, self._real, self._device = space, real, device
        self._frechet = FrechetDistance(real, device)

    def figures(self, generated: Tensor) -> Figures:
        """Of images with the features `generated`, float32 [m, num_features] on the CPU. None for what is not defined."""
        logits = torch.cat([self._space.logits(f.to(self._device)) for f in generated.split(BLOCK // 1024)])
        kd, kd_std = kernel_distance(self._real.to(self._device), generated.to(self._device))
        cs, cs_std = classifier_score(logits)
        precision, recall = precision_and_recall(self._real.to(self._device), generated.to(self._device))
        figures = {
            "fd": self._frechet.distance(generated),
            "kd": kd,
            "kd_std": kd_std,
            "cs": cs,
            "cs_std": cs_std,
            "precision": precision,
            "recall": recall,
        }
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


class FrechetDistance:
    """The Frechet distance of Heusel et al. 2017 (arXiv 1706.08500) to one set of real images."""

    def __init__(self, real: Tensor, device: torch.device | str = "cpu") -> None:
        """real: features, float [n, d]; their sums are computed once, on the device."""
        # A second and a half to import, which a command that measures nothing should not wait for.
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(
            PrecomputedFeatures(real.shape[1]), reset_real_features=False, sync_on_compute=False
        )
        self._metric, self._device = metric.to(device), device
        self._update(real, real=True)

    def _update(self, features: Tensor, real: bool) -> None:
        for batch in features.split(1024):
            self._metric.update(batch.to(self._device, torch.float64), real=real)

    def distance(self, generated: Tensor) -> float:
        """Return the paper's d^2 between features, float [m, d], and the real ones."""
        self._metric.reset()
        self._update(generated, real=False)
        return max(float(self._metric.compute()), 0.0)  # of equal images rounding makes -1e-13, which no distance is


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float | None]:
    """Return the kernel distance of Binkowski et al. 2018 (arXiv 1801.01401), squared and unbiased, so that it may be below
    0: mean and standard deviation over 100 subsets of 1000 features, float [n, d] each; of fewer over all at once, without
    deviation.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET_SIZE, len(real), len(generated))
    subsets = 1 if size == len(real) == len(generated) else SUBSETS
    metric = _buffering_metric(
        KernelInceptionDistance, PrecomputedFeatures(real.shape[1]), subsets=subsets, subset_size=size
    )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with fixed_seed(SEED):
        mean, std = metric.compute()
    return float(mean), float(std) if subsets > 1 else None


def classifier_score(logits: Tensor) -> tuple[float, float]:
    """Return the Inception score of Salimans et al. 2016 (arXiv 1606.03498), of any classifier's logits, float [n, classes]:
    mean and standard deviation over 10 parts."""
    from torchmetrics.image.inception import InceptionScore

    metric = _buffering_metric(InceptionScore, PrecomputedFeatures(logits.shape[1]), splits=SPLITS)
    metric.update(logits.double())
    with fixed_seed(SEED):
        mean, std = metric.compute()
    return float(mean), float(std)


def _buffering_metric(metric: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():  # it warns that it keeps the features, which is what it is for
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features in buffer")
        return metric(*arguments, sync_on_compute=False, **options)


def precision_and_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float | None, float | None]:
    """Improved precision and recall of Kynkaanniemi et al. 2019 (arXiv 1904.06991) of features, float32 [n, d] and [m, d]:
    the fraction of the generated within a real one's distance to its k-th nearest other, and the same with both exchanged.
    None without so many others.

    Holds a block of the distances at a time.
    """
    if min(len(real), len(generated)) <= k:
        return None, None
    centre = real.mean(0)  # torch.cdist multiplies out the square: the smaller the features, the less is lost
    real, generated = real - centre, generated - centre
    real_radii, generated_radii = (_radii(features, k) for features in (real, generated))
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled = []
    rows = max(1, BLOCK // len(generated))
    for block, radii in zip(real.split(rows), real_radii.split(rows), strict=True):
        distances = torch.cdist(block, generated)
        precise |= (distances <= radii[:, None]).any(0)
        recalled.append((distances <= generated_radii).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each to its k-th nearest other: [n]."""
    blocks = features.split(max(1, BLOCK // len(features)))
    # Each is its own nearest.
    return torch.cat([torch.cdist(b, features).topk(k + 1, largest=False).values.amax(1) for b in blocks])


def split_real(num_images: int, n: int, seed: int, reference: Reference = "half") -> tuple[Tensor, Tensor]:
    """Return two disjoint sets of n image indices, int64: the reference, and one whose distance to it is real images' own.
    Where the reference is all, those of all images, and none.

    UsageError where there are fewer than 2 n images for two sets, or none of 4.
    """
    if n <= NEIGHBOURS:
        raise UsageError(
            f"--evaluation.num-samples must be at least {NEIGHBOURS + 1}, got {n}: precision and recall look for the "
            "third nearest other image, and no other metric asks for more"
        )
    if num_images <= NEIGHBOURS:
        raise UsageError(
            f"there are {num_images} real images, generated ones are compared with at least {NEIGHBOURS + 1}: give more"
        )
    if reference == "all":
        return permutation(seed, 0, num_images), torch.empty(0, dtype=torch.int64)
    if 2 * n > num_images:
        most = num_images // 2
        fewer = f"set --evaluation.num-samples to at most {most}" if most > NEIGHBOURS else "give more images"
        raise UsageError(
            f"{n} evaluation samples need {2 * n} real images (a reference and as many held out for the floor), "
            f"there are {num_images}: {fewer}, or do without the floor, --evaluation.reference all"
        )
    order = permutation(seed, 0, num_images)
    return order[:n], order[n : 2 * n]


def mean_squared_distance(a: Tensor, b: Tensor) -> float:
    """Return mean squared difference of uint8 images of one shape, in units of the range [-1, 1]."""
    # Whole numbers, in parts: of all images the differences would take many times their memory.
    parts = zip(a.split(PART), b.split(PART), strict=True)
    total = sum(int((one.int() - other.int()).square().sum()) for one, other in parts)
    return total / a.numel() / 127.5**2


def psnr(a: Tensor, b: Tensor) -> float:
    """Return peak signal-to-noise ratio of uint8 images, all taken together, in dB; peak 255, infinite for equal ones."""
    error = mean_squared_distance(a, b) * 127.5**2
    return 10 * math.log10(255**2 / error) if error else math.inf


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and population standard deviation of each channel over uint8 images [n, C, H, W], in [0, 1].

    Where colours shift, these do.
    """
    mean, std = moments(channel_histogram(images.permute(0, 2, 3, 1).cpu().numpy()))
    return mean.tolist(), std.tolist()
