"""What stands between a data set and z: how its samples become noisy z, and how z becomes images again.

Everything that trains, shows or measures goes through a codec, and nothing else knows what z is.
"""

from typing import Protocol

import torch
from torch import Tensor

from pdfast.networks import ModelConfig
from pdfast_kernels import diffuse


class Codec(Protocol):
    def data_shape(self, z_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of the images whose z have that shape."""

    def diffuse(self, x: Tensor, phi: Tensor, key: Tensor, index: Tensor, flip: Tensor | None) -> Tensor:
        """Return z = cos(phi) encode(x) + sin(phi) noise, float32 [n, ...], of a batch x of the data set at angles phi [n].

        key, index: of the noise (`pdfast.diffusion.noise`); flip: bool [n], the samples to mirror, or None.
        """

    def encode(self, x: Tensor) -> Tensor:
        """Return z without noise, float32 [n, ...], of images uint8 [n, H, W, C]."""

    def decode(self, z: Tensor) -> Tensor:
        """Return images, uint8 [n, C, H, W], of z."""


class Pixels:
    """z is the image: [n, C, H, W] in [-1, 1]."""

    def data_shape(self, z_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = z_shape
        return height, width, channels

    def diffuse(self, x: Tensor, phi: Tensor, key: Tensor, index: Tensor, flip: Tensor | None) -> Tensor:
        return diffuse(x, phi, key, index, flip)  # of bytes, in one pass

    def encode(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, z: Tensor) -> Tensor:
        return ((z.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


PIXELS = Pixels()


def codec_of(network: ModelConfig) -> Codec:
    """Return the codec of the data that a network of that configuration is for."""
    return PIXELS
