"""Distances between sets of images: the Frechet distance in a feature space, and distances in pixels."""

import math
import warnings

from torch import Tensor, nn

from pdfast.diffusion.noise import permutation
from pdfast.engine.world import World
from pdfast.errors import UsageError


class FrechetDistance:
    """The Frechet distance of Heusel et al. 2017 (arXiv 1706.08500) to one set of real images.

    torchmetrics computes it, its sums in float64. Each process of a world computes the features of its part of the images.
    """

    def __init__(self, features: nn.Module, real: Tensor, world: World, batch_size: int = 256) -> None:
        """features: uint8 [n, C, H, W] -> float [n, num_features], with `name` and `num_features`, on the world's device.
        real: uint8 [n, C, H, W], the same in all processes; its statistics are computed once.
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
        # The sums over the processes are ours: torchmetrics would move them by the backend of the gradients.
        metric = FrechetInceptionDistance(features, reset_real_features=False, sync_on_compute=False)
        self._metric = metric.to(world.device)
        self._world, self._batch_size = world, batch_size
        self._update(real, real=True)

    def _update(self, images: Tensor, real: bool) -> None:
        part = self._world.part(len(images))
        for batch in images[part[part < len(images)]].split(self._batch_size):
            if len(batch):
                self._metric.update(batch.to(self._world.device), real=real)
        for name in ("features_sum", "features_cov_sum", "features_num_samples"):
            name = f"{'real' if real else 'fake'}_{name}"
            setattr(self._metric, name, self._world.sum(getattr(self._metric, name)))

    def distance(self, generated: Tensor) -> float:
        """The paper's d^2 between uint8 images [m, C, H, W], the same in all processes, and the real ones."""
        self._metric.reset()
        self._update(generated, real=False)
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
