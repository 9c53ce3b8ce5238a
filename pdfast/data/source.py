"""Sources of images: uint8 NHWC batches by global sample index.

A global sample index counts the samples of a round without end; epoch e of N images is [e N, (e + 1) N). The order
within an epoch is a stateless permutation, so that a batch depends on its indices and the seed alone: on any rank and
after any stop.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pdfast.diffusion.noise import permutation
from pdfast.io.bounds import NETWORK
from pdfast.io.errors import UsageError

LARGEST_LABEL = (1 << 31) - 1
NUMBERED = f"number the classes from 0, one after the other (labels are at most {LARGEST_LABEL})"
SHARE_OF_GPU = 0.25  # of its free memory, which the images of a data set may take
LoaderName = Literal["auto", "resident", "dali", "portable"]


@dataclass(frozen=True)
class Batch:
    """Samples of a data set."""

    x: Tensor
    """uint8 images [n, H, W, C]."""
    cond: Any
    """A tree of tensors with the batch first; of labelled images the labels, int64 [n]; None where there is nothing."""


def order_of(samples: Tensor, num_images: int, seed: int) -> Tensor:
    """Return which images, int64 [n] on the CPU, the global sample indices `samples`, int64 [n], are."""
    samples = samples.cpu()  # where the permutation is
    epoch, place = samples // num_images, samples % num_images
    indices = torch.empty_like(samples)
    for e in epoch.unique().tolist():
        here = epoch == e
        indices[here] = permutation(seed, e, num_images)[place[here]]
    return indices


class BadImages:
    """The images of a data set that could not be used, up to now."""

    def __init__(self, name: str, num_images: int, max_bad: float = 0.0) -> None:
        """name: of the set. max_bad: the fraction of it that may be bad."""
        self.reasons: dict[str, str] = {}
        """Their names, and what is wrong with each."""
        self.on_new: Callable[[str, str], None] = lambda name, reason: None
        """Called with name and reason of each from now on."""
        self._name, self._num_images, self._max_bad = name, num_images, max_bad

    def add(self, reasons: Mapping[str, str]) -> None:
        """Those that are known already are not counted again. UsageError where they are too many."""
        for name, reason in reasons.items():
            if name not in self.reasons:
                self.reasons[name] = reason
                self.on_new(name, reason)
        if len(self.reasons) > self._max_bad * self._num_images:
            name, reason = next(iter(self.reasons.items()))
            raise UsageError(
                f"{len(self.reasons)} of {self._num_images} images of {self._name} cannot be used, more than --max-bad "
                f"{self._max_bad:g} allows; the first: {name} ({reason}): remove or mend them, or allow more"
            )


class Hashes(NamedTuple):
    """SHA-256, in hexadecimal."""

    everything: str
    """Of the images, in their order, and their labels."""
    images: str
    """Of the images alone; the same where they have no labels."""


class Identity:
    """The identity of a data set by its contents, independent of its name and place; computed on demand, since that reads it."""

    def __init__(self, find: Callable[[], Hashes], find_earlier: Callable[[], str] | None = None) -> None:
        """find_earlier: what the version before wrote down, where that is another."""
        self._find, self._find_earlier = find, find_earlier or (lambda: self.hashes.everything)

    @cached_property
    def hashes(self) -> Hashes:
        return self._find()

    @cached_property
    def earlier(self) -> str:
        """As the version before computed it, for the runs that it began."""
        return self._find_earlier()


class ImageSource(Protocol):
    name: str
    description: str  # how many images, of what, and what loads them, for people
    num_images: int
    shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int  # 0 without labels
    bad: BadImages
    identity: Identity

    def stream(self, part: Tensor, batch_size: int, update: int, seed: int) -> Iterator[Batch]:
        """Without end, from `update` on: the images of the global sample indices update * batch_size + part, int64 [n], in
        the order that the seed gives each epoch."""

    def take(self, indices: Tensor) -> Batch:
        """Return the images at `indices`, int64 [n], in the data set's own order."""


def of_tensors(images: Tensor, labels: Tensor | None = None) -> Hashes:
    """Of uint8 images [N, H, W, C] and labels, int64 [N], or none."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.cpu().contiguous().numpy().data)
    of_images = digest.hexdigest()
    if labels is not None:
        digest.update(labels.cpu().contiguous().numpy().data)
    return Hashes(digest.hexdigest(), of_images)


def check_labels(labels: Tensor | None, num_classes: int, spec: str) -> None:
    """Raise a UsageError unless labels, int64 [N] with -1 for none, all number classes of a network that is conditioned on
    `num_classes`; some of its classes may have no images."""
    if not num_classes:
        return
    if labels is None:
        raise UsageError(
            f"{spec} has no labels, the network is conditioned on {num_classes} classes: give images with labels, or, where no "
            "teacher is given, leave out --network.num-classes"
        )
    if (largest := int(labels.max())) >= num_classes:
        others = f"set --network.num-classes {largest + 1}"
        if largest >= NETWORK["num_classes"].high:  # identifiers, no numbers of classes
            others = "number the classes from 0, one after the other, and set --network.num-classes to their number"
        raise UsageError(
            f"{spec} has the label {largest}, the network is conditioned on {num_classes} classes, 0 to {num_classes - 1}: give "
            f"images of these classes, or, where no teacher is given, {others}"
        )


def home_of(num_bytes: int, device: torch.device) -> torch.device:
    """Return where so many bytes of images are kept for use on the device: there, or where they would take more than their
    share of what is free, in the host's memory."""
    if device.type == "cuda" and num_bytes > SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


class ResidentImages:
    """A whole data set in memory as uint8: on the device that uses it or, where that has no room, in the host's memory, from which
    batches are copied through pinned memory while the device computes."""

    def __init__(
        self, name: str, images: Tensor, labels: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """images: uint8 [N, H, W, C]; labels: int64 [N] or None. device: where batches are wanted."""
        self.name = name
        self.bad = BadImages(name, len(images))
        self.identity = Identity(lambda: of_tensors(self._images, self._labels))
        self.num_images, height, width, channels = images.shape
        self.shape = (height, width, channels)
        self.num_classes = int(labels.max()) + 1 if labels is not None else 0
        self._device = torch.device(device)
        home = home_of(images.nbytes, self._device)
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        self.home = "in memory" if home == self._device else "in the host's memory, for the GPU has no room"
        """Where the images are kept, for people."""
        self.description = f"{name}: {len(images)} images of {self.shape}{classes}, {self.home}"
        self._images = images.to(home)
        self._labels = labels.to(home) if labels is not None else None

    def stream(self, part: Tensor, batch_size: int, update: int, seed: int) -> Iterator[Batch]:
        while True:
            yield self.batch(update * batch_size + part, seed)
            update += 1

    def batch(self, samples: Tensor, seed: int) -> Batch:
        """Return the images of global sample indices, int64 [n], in the order that the seed gives each epoch."""
        return self.take(order_of(samples, self.num_images, seed))

    def take(self, indices: Tensor) -> Batch:
        if self._images.device.type == "cuda" and indices.device.type == "cpu":
            # From other memory the host would wait for all that the device has yet to do.
            indices = indices.pin_memory().to(self._device, non_blocking=True)
        return Batch(self._of(self._images, indices), None if self._labels is None else self._of(self._labels, indices))

    def _of(self, everything: Tensor, indices: Tensor) -> Tensor:
        if everything.device.type == self._device.type:
            return everything[indices]
        pinned = torch.empty(len(indices), *everything.shape[1:], dtype=everything.dtype, pin_memory=True)
        torch.index_select(everything, 0, indices, out=pinned)
        return pinned.to(self._device, non_blocking=True)
