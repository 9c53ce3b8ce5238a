"""One part of a published data set, and whether all of it is there."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pdfast.io.errors import UsageError

COUNTED = 1 << 22  # values at once, for each of which NumPy makes an int64


class Split(NamedTuple):
    """images: uint8 [N, H, W, C]; labels: int64 [N]."""

    images: np.ndarray
    labels: np.ndarray


def channel_histogram(images: np.ndarray) -> np.ndarray:
    """Return how often each of the 256 values occurs: int64 [C, 256], of uint8 images [N, H, W, C]."""
    counts = np.zeros((images.shape[3], 256), dtype=np.int64)
    chunk = max(COUNTED // max(images[0, ..., 0].size, 1), 1) if len(images) else 1
    for start in range(0, len(images), chunk):
        for channel, count in enumerate(counts):
            count += np.bincount(images[start : start + chunk, ..., channel].ravel(), minlength=256)
    return counts


def moments(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, float64 [C], of a `channel_histogram`, its values taken as 0 to 1."""
    values = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    return mean, np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))


def channel_means_and_stds(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, float64 [C], of uint8 images [N, H, W, C] taken as 0 to 1."""
    return moments(channel_histogram(images))


def check_split(split: Split, where: str | Path, *, per_class: int, mean: tuple[float, ...] | None = None) -> None:
    """Raise a UsageError unless there are 10 classes of `per_class` images each, with channel means within 0.002 of `mean`."""
    counts = np.bincount(split.labels, minlength=10)
    remedy = "it is damaged or another data set, download it again"
    if len(split.labels) != 10 * per_class:
        raise UsageError(f"{where} has {len(split.labels)} images, expected {10 * per_class}: {remedy}")
    if not np.array_equal(counts, [per_class] * 10):
        raise UsageError(f"{where} has classes of {counts.tolist()} images, expected 10 of {per_class}: {remedy}")
    if mean is not None:
        found = channel_means_and_stds(split.images)[0]
        if np.abs(found - mean).max() > 0.002:
            raise UsageError(f"{where} has channel means {found.round(4).tolist()}, expected {list(mean)}: {remedy}")
