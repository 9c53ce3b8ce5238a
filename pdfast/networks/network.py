"""What all networks have in common, ours and those of others."""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import nn

from pdfast.diffusion import Prediction


class ModelConfig:
    """What the configuration of every network has: plain data that it can be built from again. In files kinds are told apart by
    the field `kind`, which only our U-Net's lacks: see `pdfast.pretrained.KINDS`."""

    image_size: int
    image_channels: int
    num_classes: int
    prediction: Prediction
    runs_on_meta: ClassVar[bool] = True
    """Whether its operations are counted on tensors without content."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_channels, self.image_size, self.image_size

    def build(self, dropout: float = 0.0) -> Any:
        """The network, with initial weights."""
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
    def image_channels(self) -> int:  # type: ignore[override]
        return self.inner.image_channels

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.inner.num_classes

    @property
    def runs_on_meta(self) -> bool:  # type: ignore[override]
        return getattr(self.inner, "runs_on_meta", True)


class Network(nn.Module):
    """`network(z, phi, cond) -> output`: z [N, C, H, W] float, phi [N] float32 in radians, cond int64 [N] class indices (or None
    for an unconditional network) to [N, P*C, H, W] float32, P = 2 if it predicts both x and eps."""

    config: Any
    """A ModelConfig, in the terms of its kind: `config.build()` builds it again."""
    prediction: Prediction
    dtype: torch.dtype
    """Of the activations of its blocks."""

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks whose activations are of `dtype`: nearly all parameters, and all but a few of the operations. A network that
        does not say is one by itself."""
        yield self
