"""Distances between sets of images: the Frechet distance in a feature space, and distances in pixels."""

import math
import warnings

from torch import Tensor, nn

from pdfast.diffusion.noise import permutation
from pdfast.errors import UsageError


class FrechetDistance:
    """The Frechet distance of Heusel et al. 2017 (arXiv 1706.08500) to one set of real images.

    torchmetrics computes it, its sums in float64.
    """

    def __init__(self, features: nn.Module, real: Tensor, batch_size: int = 256) -> None:
        """features: uint8 [n, C, H, W] -> float [n, num_features], with `name` and `num_features`.
        real: uint8 [n, C, H, W], on the features' device; its statistics are computed once.
        Warns where n <= num_features.
        """
        # A second and a half to import, which a command that measures nothing should not wait for.
        from torchmetrics.image.fid import FrechetInceptionDistance

        if len(real) <= features.num_features:
            warnings.warn(
                f"{len(real)} images are too few for the {features.num_features} features of {features.name}: their "
                "covariance is singular, take the distance as a trend",
                stacklevel=2,
            )
        # Without sync_on_compute=False a distance measured by one process of several would wait for the others.
        metric = FrechetInceptionDistance(features, reset_real_features=False, sync_on_compute=False)
        self._metric = metric.to(real.device)
        self._batch_size = batch_size
        for batch in real.split(batch_size):
            self._metric.update(batch, real=True)

    def distance(self, generated: Tensor) -> float:
        """The paper's d^2 between uint8 images [m, C, H, W] and the real ones, in this process alone."""
        self._metric.reset()
        for batch in generated.split(self._batch_size):
            self._metric.update(batch, real=False)
        return float(self._metric.compute())


def split_real(num_images: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of n image indices, int64: the reference, and one whose distance to it is real images' own.

    UsageError where there are fewer than 2 n images.
    """
    if 2 * n > num_images:
        raise UsageError(
            f"{n} evaluation samples need {2 * n} real images (a reference and as many held out for the floor), "
            f"there are {num_images}: set --evaluation.num-samples to at most {num_images // 2}"
        )
    order = permutation(seed, 0, num_images)
    return order[:n], order[n : 2 * n]


def mean_squared_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of uint8 images of one shape, in units of the range [-1, 1]."""
    return float((a.double() - b.double()).square().mean()) / 127.5**2


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images, all taken together, in dB; peak 255, infinite for equal ones."""
    error = mean_squared_distance(a, b) * 127.5**2
    return 10 * math.log10(255**2 / error) if error else math.inf


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel over uint8 images [n, C, H, W], in [0, 1].

    Where colours shift, these do.
    """
    values = images.double() / 255
    return values.mean((0, 2, 3)).tolist(), values.std((0, 2, 3), correction=0).tolist()
