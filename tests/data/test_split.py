"""Whether a data set is the whole and the right one, and the statistics that tell."""

import numpy as np
import pytest

from pdfast.data.split import Split, channel_means_and_stds, check_split
from tests.data.errors import refusal

MEAN = (0.25, 0.5)


def split(count: int = 60) -> Split:
    """Six images a class, of 64 and 128 in the two channels (0.251 and 0.502)."""
    images = np.broadcast_to(np.array([64, 128], dtype=np.uint8), (count, 2, 2, 2))
    return Split(images, np.arange(count) % 10)


def test_statistics_agree_with_numpy():
    images = np.random.default_rng(0).integers(0, 200, (5000, 3, 5, 3), dtype=np.uint8)
    images[..., 1] //= 2
    mean, std = channel_means_and_stds(images)
    assert np.allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    assert np.allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)


def test_the_whole_is_accepted():
    check_split(split(), "a", per_class=6)
    check_split(split(), "a", per_class=6, mean=MEAN)


@pytest.mark.parametrize("count", [50, 59, 61])
def test_another_number_of_images_is_refused(count):
    message = refusal(check_split, split(count), "a.npz", per_class=6, names="a.npz")
    assert f"has {count} images, expected 60" in message


@pytest.mark.parametrize("label", [0, 10])
def test_uneven_classes_are_refused(label):
    labels = split().labels.copy()
    labels[5] = label
    message = refusal(check_split, Split(split().images, labels), "a.npz", per_class=6, names="a.npz")
    assert "expected 10 of 6" in message


@pytest.mark.parametrize("mean", [(0.2535, 0.5), (0.25, 0.4995), (0.5, 0.25)])
def test_other_colours_are_refused(mean):
    message = refusal(check_split, split(), "a.npz", per_class=6, mean=mean, names="a.npz")
    assert "channel means [0.251, 0.502]" in message and str(list(mean)) in message
