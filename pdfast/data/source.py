"""Sources of images: uint8 NHWC batches by global sample index.

A global sample index counts the samples of a round without end; epoch e of N images is [e N, (e + 1) N). The order
within an epoch is a stateless permutation, so that a batch depends on its indices and the seed alone: on any rank and
after any stop.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pdfast.diffusion.noise import permutation

LoaderName = Literal["auto", "resident", "dali", "portable"]


@dataclass(frozen=True)
class Batch:
    """images: uint8 [n, H, W, C]; labels: int64 [n], or None for unlabelled data."""

    images: Tensor
    labels: Tensor | None


def order_of(samples: Tensor, num_images: int, seed: int) -> Tensor:
    """Which images, int64 [n] on the CPU, the global sample indices `samples`, int64 [n], are."""
    samples = samples.cpu()  # where the permutation is
    epoch, place = samples // num_images, samples % num_images
    indices = torch.empty_like(samples)
    for e in epoch.unique().tolist():
        here = epoch == e
        indices[here] = permutation(seed, e, num_images)[place[here]]
    return indices


class ImageSource(Protocol):
    name: str
    description: str  # how many images, of what, and what loads them, for people
    num_images: int
    shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int  # 0 without labels
    bad: dict[str, str]  # names of images that could not be used, up to now, and why
    on_bad: Callable[[str, str], None]  # called for each of them from now on
    fingerprint: str  # SHA-256, in hexadecimal, of shape, images (or their names and sizes) and labels

    def stream(self, part: Tensor, batch_size: int, update: int, seed: int) -> Iterator[Batch]:
        """Without end, from `update` on: the images of the global sample indices update * batch_size + part, int64 [n], in
        the order that the seed gives each epoch."""

    def take(self, indices: Tensor) -> Batch:
        """The images at `indices`, int64 [n], in the data set's own order."""


class ResidentImages:
    """A whole data set held as uint8 on one device."""

    def __init__(
        self, name: str, images: Tensor, labels: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """images: uint8 [N, H, W, C]; labels: int64 [N] or None."""
        digest = hashlib.sha256(str(tuple(images.shape)).encode())
        for tensor in (images,) if labels is None else (images, labels):
            digest.update(tensor.cpu().contiguous().numpy())
        self.name = name
        self.bad: dict[str, str] = {}
        self.on_bad: Callable[[str, str], None] = lambda name, reason: None
        self.fingerprint = digest.hexdigest()
        self.num_images = len(images)
        self.shape = tuple(images.shape[1:])
        self.num_classes = int(labels.max()) + 1 if labels is not None else 0
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        self.description = f"{name}: {len(images)} images of {self.shape}{classes}, in memory"
        self._images = images.to(device)
        self._labels = labels.to(device) if labels is not None else None

    def stream(self, part: Tensor, batch_size: int, update: int, seed: int) -> Iterator[Batch]:
        while True:
            yield self.batch(update * batch_size + part, seed)
            update += 1

    def batch(self, samples: Tensor, seed: int) -> Batch:
        """The images of global sample indices, int64 [n], in the order that the seed gives each epoch."""
        return self.take(order_of(samples, self.num_images, seed))

    def take(self, indices: Tensor) -> Batch:
        indices = indices.to(self._images.device)
        return Batch(self._images[indices], self._labels[indices] if self._labels is not None else None)
