"""What all networks have in common, ours and those of others."""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pdfast.diffusion import Prediction, noise
from pdfast.diffusion.noise import Stream


class ModelConfig:
    """What the configuration of every network has: plain data that it can be built from again. In files kinds are told apart by
    the field `kind`, which only our U-Net's lacks: see `pdfast.pretrained.KINDS`."""

    image_size: int
    """Height in pixels, and width where that is not another."""
    image_width: int | None = None
    image_channels: int
    num_classes: int
    """Classes for conditioning; 0 for none."""
    prediction: Prediction
    runs_on_meta: ClassVar[bool] = True
    """Whether its operations are counted on tensors without content."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of z, (C, H, W)."""
        return self.image_channels, self.image_size, self.image_width or self.image_size

    def condition(self, cond: Any) -> Any:
        """Return what the network is given of the condition that comes with the data: of class labels, int64 [N], the labels, or
        None where it is not conditioned on them."""
        return cond if self.num_classes else None

    def draw_condition(self, seed: int, index: Tensor) -> Any:
        """Return the condition of generated samples, a function of the seed and each sample's index, int64 [N]: uniform classes."""
        key = noise.key(seed, Stream.LABEL)
        return self.condition(noise.integer(key, index, self.num_classes) if self.num_classes else None)

    def build(self, dropout: float = 0.0) -> Any:
        """Return the network, with initial weights."""
        raise NotImplementedError

    def checked(self, where: str) -> Self:
        """Return it. UsageError where its fields, each of its type, do not fit each other."""
        return self


class WrapperConfig(ModelConfig):
    """The configuration of a network around another, whose images and classes are its own."""

    @property
    def inner(self) -> Any:
        """The other's configuration."""
        raise NotImplementedError

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.inner.image_size

    @property
    def image_width(self) -> int | None:  # type: ignore[override]
        return getattr(self.inner, "image_width", None)

    @property
    def image_channels(self) -> int:  # type: ignore[override]
        return self.inner.image_channels

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.inner.num_classes

    def condition(self, cond: Any) -> Any:
        return self.inner.condition(cond) if isinstance(self.inner, ModelConfig) else super().condition(cond)

    def draw_condition(self, seed: int, index: Tensor) -> Any:
        of = self.inner.draw_condition if isinstance(self.inner, ModelConfig) else super().draw_condition
        return of(seed, index)

    @property
    def runs_on_meta(self) -> bool:  # type: ignore[override]
        return getattr(self.inner, "runs_on_meta", True)


class Network(nn.Module):
    """`network(z, phi, cond) -> output`: z [N, C, ...] float, phi [N] float32 in radians, cond a tree of tensors with the batch
    first (class labels int64 [N]; None for an unconditional network) to [N, P*C, ...] float32, P = 2 if it predicts both x and
    eps."""

    config: Any
    """A ModelConfig, in the terms of its kind: `config.build()` builds it again."""
    prediction: Prediction
    dtype: torch.dtype
    """Of the activations of its blocks."""

    def blocks(self) -> Iterator[nn.Module]:
        """Yield the blocks whose activations are of `dtype`: nearly all parameters, and all but a few of the operations.
        Default: the whole network is one block."""
        yield self
