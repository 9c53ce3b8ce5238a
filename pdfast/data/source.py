"""Sources of images: uint8 NHWC batches by global sample index.

A global sample index counts the samples of a round without end; epoch e of N images is [e N, (e + 1) N). The order
within an epoch is a stateless permutation, so that a batch depends on its indices and the seed alone: on any rank and
after any stop.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pdfast.data.arrays import load_array_file
from pdfast.data.folder import load_image_folder
from pdfast.diffusion.noise import permutation
from pdfast.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """images: uint8 [n, H, W, C]; labels: int64 [n], or None for unlabelled data."""

    images: Tensor
    labels: Tensor | None


class ImageSource(Protocol):
    name: str
    num_images: int
    shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int  # 0 without labels
    fingerprint: str  # SHA-256, in hexadecimal, of shape, images and labels

    def batch(self, samples: Tensor, seed: int) -> Batch:
        """The images of global sample indices, int64 [n], in the order that the seed gives each epoch."""

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
        self.fingerprint = digest.hexdigest()
        self.num_images = len(images)
        self.shape = tuple(images.shape[1:])
        self.num_classes = int(labels.max()) + 1 if labels is not None else 0
        self._images = images.to(device)
        self._labels = labels.to(device) if labels is not None else None

    def batch(self, samples: Tensor, seed: int) -> Batch:
        samples = samples.cpu()  # where the permutation is
        epoch, place = samples // self.num_images, samples % self.num_images
        indices = torch.empty_like(samples)
        for e in epoch.unique().tolist():
            here = epoch == e
            indices[here] = permutation(seed, e, self.num_images)[place[here]]
        return self.take(indices)

    def take(self, indices: Tensor) -> Batch:
        indices = indices.to(self._images.device)
        return Batch(self._images[indices], self._labels[indices] if self._labels is not None else None)


def load_source(spec: str, *, image_size: int, channels: int, device: torch.device | str = "cpu") -> ImageSource:
    """The built-in `digits`, a .npy or .npz file of uint8 images, or a folder of image files (`./digits` if so named).

    UsageError, in one line that names the path, for data that are missing, damaged, or of images that are not
    [image_size, image_size, channels].
    """
    path = Path(spec)
    kinds = "give `digits`, a .npy or .npz file, or a folder of image files"
    if spec == "digits":
        with resources.as_file(resources.files("pdfast.data") / "digits.npz") as file:
            images, labels = load_array_file(file)
    elif path.is_dir():
        images, labels = load_image_folder(path, image_size, channels)
    elif not path.exists():
        raise UsageError(f"there are no data at {spec}: {kinds}")
    elif path.suffix in (".npy", ".npz"):
        images, labels = load_array_file(path)
    else:
        raise UsageError(f"{spec} is not data that pdfast reads: {kinds}")
    expected = (image_size, image_size, channels)
    if images.shape[1:] != expected:
        raise UsageError(
            f"{spec} has images of (height, width, channels) {images.shape[1:]}, the network takes {expected}: "
            "set --network.image-size and --network.image-channels, or prepare the data at that size"
        )
    tensors = torch.from_numpy(images), None if labels is None else torch.from_numpy(labels)
    return ResidentImages(path.absolute().name, *tensors, device)
