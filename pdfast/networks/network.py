"""What all networks have in common, ours and those of others."""

from collections.abc import Iterator
from dataclasses import replace
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
    null_label: int | None = None
    """The label by which it is told no class, num_classes; None for a network that knows none."""
    guidance: tuple[float, ...] | None = None
    """Of classifier-free guidance inside it: g; or the least and the largest g, where g is a part of its condition; None for none."""
    takes_guidance: ClassVar[bool] = False
    """Whether there is a network of the kind to which g is an input."""
    runs_on_meta: ClassVar[bool] = True
    """Whether its operations are counted on tensors without content."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of z, (C, H, W)."""
        return self.image_channels, self.image_size, self.image_width or self.image_size

    def condition(self, cond: Any, guidance: Tensor | None = None) -> Any:
        """Return what the network is given of the condition that comes with the data: of class labels, int64 [N], the labels, or
        None where it is not conditioned on them.

        guidance: g, float32 [N], of a network that takes it as a part of its condition, which then is {"label": ..., "guidance": ...};
        the middle of its range unless said.
        """
        if not self.num_classes:
            return None
        if self.guidance is None or len(self.guidance) < 2:
            return cond
        if guidance is None:
            guidance = torch.full(cond.shape[:1], sum(self.guidance) / 2, device=cond.device)
        return {"label": cond, "guidance": guidance}

    def draw_condition(self, seed: int, index: Tensor) -> Any:
        """Return the condition of generated samples, a function of the seed and each sample's index, int64 [N]: uniform classes, and
        guidance uniform in its range."""
        if not self.num_classes:
            return self.condition(None)
        labels = noise.integer(noise.key(seed, Stream.LABEL), index, self.num_classes)
        return self.condition(labels, self.draw_guidance(noise.key(seed, Stream.GUIDANCE), index))

    def draw_guidance(self, key: noise.Key, index: Tensor) -> Tensor | None:
        """Return g, float32 [N], uniform in its range, where that is a part of the condition, else None."""
        if self.guidance is None or len(self.guidance) < 2:
            return None
        low, high = self.guidance
        return (low + (high - low) * noise.uniform(key, index)).float()

    def drop(self, cond: Any, dropped: Tensor) -> Any:
        """Return the condition with no class in the place of those that are dropped, bool [N]."""
        if isinstance(cond, dict):
            return cond | {"label": self.drop(cond["label"], dropped)}
        assert self.null_label is not None
        return torch.where(dropped, self.null_label, cond)

    def guided(self, guidance: tuple[float, ...]) -> Self:
        """Return the configuration of a student that has this guidance inside. ValueError where it cannot have it."""
        if len(guidance) == 2 and not self.takes_guidance:
            raise ValueError("networks of this kind take no guidance as an input: give one number")
        return self.changed(guidance=guidance)

    def changed(self, **fields: Any) -> Self:
        """Return the configuration with other fields: those of the network inside, where it is of one around another."""
        return replace(self, **fields)  # type: ignore[type-var]

    def build(self, dropout: float = 0.0) -> Any:
        """Return the network, with initial weights."""
        raise NotImplementedError

    def checked(self, where: str) -> Self:
        """Return it. UsageError where its fields, each of its type, do not fit each other."""
        return self


class WrapperConfig(ModelConfig):
    """The configuration of a network around another, whose images and classes are its own."""

    inner_field: ClassVar[str] = "network"
    """The field that holds the other's configuration."""

    @property
    def inner(self) -> Any:
        """The other's configuration."""
        return getattr(self, self.inner_field)

    def changed(self, **fields: Any) -> Self:
        inner = self.inner
        inner = inner.changed(**fields) if isinstance(inner, ModelConfig) else replace(inner, **fields)
        return replace(self, **{self.inner_field: inner})  # type: ignore[type-var]

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

    @property
    def null_label(self) -> int | None:  # type: ignore[override]
        return self.inner.null_label

    @property
    def guidance(self) -> tuple[float, ...] | None:  # type: ignore[override]
        return self.inner.guidance

    @property
    def takes_guidance(self) -> bool:  # type: ignore[override]
        return self.inner.takes_guidance

    def condition(self, cond: Any, guidance: Tensor | None = None) -> Any:
        of = self.inner.condition if isinstance(self.inner, ModelConfig) else super().condition
        return of(cond, guidance)

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
