"""A data set of encoded images, decoded as they are needed by a loader, or once and for all.

What cannot be used is replaced by the next image that can, in the data set's own order, so that all loaders give the same
samples whatever they knew of it beforehand; its name and what is wrong with it are kept.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pdfast.data.encoded import EncodedImages
from pdfast.data.identity import of_files, of_names
from pdfast.data.pictures import BadImage, Size, decode, sides
from pdfast.data.source import BadImages, Batch, Identity, ResidentImages, order_of
from pdfast.io.errors import UsageError

T = TypeVar("T")
CHUNK = 1024  # images decoded between two looks at what was bad


def spare_cores() -> int:
    """Of this process's share of the machine, those that training leaves: all but one."""
    return (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1


class Bad(NamedTuple):
    """An image that cannot be used."""

    image: int
    reason: str


class Decoded(NamedTuple):
    """uint8 [n, H, W, C]; which images they are, int64 [n], for some may be replaced; those that were bad."""

    images: Tensor
    indices: Tensor
    bad: list[Bad]


class Samples:
    """Decodes images of a data set, in any order, with Pillow."""

    def __init__(self, encoded: EncodedImages, size: Size, channels: int, num_classes: int) -> None:
        """num_classes: a label of that or more, or none at all, makes an image bad; 0 where labels are not used."""
        self.encoded, self.size, self.channels, self.num_classes = encoded, size, channels, num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image, (H, W, C)."""
        return *sides(self.size), self.channels

    def content(self, i: int) -> bytes:
        """Return the bytes of image i. BadImage where they, or the label, are not there."""
        if self.num_classes:
            assert self.encoded.labels is not None  # `open_files` refuses data without any
            if not 0 <= (label := self.encoded.labels[i]) < self.num_classes:
                raise BadImage("no label" if label < 0 else f"label {label}, not one of {self.num_classes} classes")
        return self.encoded.read(i)

    def usable(self, i: int, use: Callable[[int, bytes], T]) -> tuple[T, int, list[Bad]]:
        """Return what `use` makes of image i or else of the next that it takes, which that is, and those passed over."""
        bad: list[Bad] = []
        for _ in range(len(self.encoded)):
            try:
                return use(i, self.content(i)), i, bad
            except BadImage as error:
                bad.append(Bad(i, str(error)))
            i = (i + 1) % len(self.encoded)
        raise UsageError(f"none of {len(self.encoded)} images can be used: the first is {bad[0].reason}")

    def image(self, i: int) -> tuple[np.ndarray, int, list[Bad]]:
        return self.usable(i, lambda _, content: decode(content, self.size, self.channels))

    def decoded(self, indices: list[int]) -> Decoded:
        return collate([self.image(i) for i in indices])


def collate(images: list[tuple[np.ndarray, int, list[Bad]]]) -> Decoded:
    """Of what `Samples.image` gives, for some images."""
    return Decoded(
        torch.from_numpy(np.stack([image for image, _, _ in images])),
        torch.tensor([i for _, i, _ in images]),
        [one for _, _, bad in images for one in bad],
    )


class Loader(Protocol):
    """Decodes the images of a data set ahead of their use."""

    name: str

    def stream(self, indices: Iterator[list[int]]) -> Iterator[Decoded]:
        """Yield the images of one list of indices after the other."""


class FileImages:
    """An image source that reads encoded images while it goes on."""

    def __init__(self, name: str, samples: Samples, loader: Loader, max_bad: float, device: torch.device | str) -> None:
        """max_bad: the fraction of the images that may be bad."""
        encoded = samples.encoded
        of = encoded, samples.size, samples.channels
        self.identity = Identity(lambda: of_files(*of), lambda: of_names(*of))
        self.name, self.num_images = name, len(encoded)
        self.shape = samples.shape
        self.num_classes = 0 if encoded.labels is None else int(encoded.labels.max()) + 1
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        self.description = f"{name}: {encoded.description}{classes}, as images of {self.shape}"
        self.bad = BadImages(name, len(encoded), max_bad)
        self._samples, self._loader, self._device = samples, loader, torch.device(device)

    def take(self, indices: Tensor) -> Batch:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return self._batch(collate(list(pool.map(self._samples.image, indices.tolist()))))

    def stream(self, part: Tensor, batch_size: int, update: int, seed: int) -> Iterator[Batch]:
        def indices() -> Iterator[list[int]]:
            at = update
            while True:
                yield order_of(at * batch_size + part, self.num_images, seed).tolist()
                at += 1

        return map(self._batch, self._loader.stream(indices()))

    def _batch(self, decoded: Decoded) -> Batch:
        encoded = self._samples.encoded
        self.bad.add({encoded.names[i]: reason for i, reason in decoded.bad})
        images = decoded.images
        labels = None if encoded.labels is None else torch.from_numpy(encoded.labels)[decoded.indices]
        return Batch(self._on_device(images), None if labels is None else self._on_device(labels))

    def _on_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def resident(self) -> ResidentImages:
        """Return all of them, decoded now and kept on the device."""
        images = np.empty((self.num_images, *self.shape), dtype=np.uint8)
        numbers = np.empty(self.num_images, dtype=np.int64)
        for start in range(0, self.num_images, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, self.num_images))
            batch = self.take(rows)
            images[rows] = batch.x.cpu()
            if batch.cond is not None:
                numbers[rows] = batch.cond.cpu()
        labels = None if self._samples.encoded.labels is None else torch.from_numpy(numbers)
        resident = ResidentImages(self.name, torch.from_numpy(images), labels, self._device)
        # Of the files, whatever loads them: a run may go on with another loader.
        resident.description = f"{self.description}, {resident.home}"
        resident.identity, resident.bad = self.identity, self.bad
        resident.num_classes = self.num_classes
        return resident
