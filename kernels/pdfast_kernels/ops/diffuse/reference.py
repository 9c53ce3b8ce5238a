"""Noisy images in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

import torch
from torch import Tensor

from pdfast_kernels.ops.columns import like
from pdfast_kernels.random import philox


def mix(images: Tensor, phi: Tensor, noise: Tensor, flip: Tensor | None) -> Tensor:
    """cos(phi) x + sin(phi) noise, of uint8 [N, H, W, C] and in the dtype of noise [N, C, H, W]."""
    x = images.permute(0, 3, 1, 2).to(noise.dtype) / 127.5 - 1
    if flip is not None:
        x = torch.where(like(flip, x), x.flip(-1), x)
    return like(torch.cos(phi), x) * x + like(torch.sin(phi), x) * noise


def diffuse(
    images: Tensor,
    phi: Tensor,
    key: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    # In float32; in float64 for that dtype. `diffuse` has asked the indices where it can.
    n, height, width, channels = images.shape
    noise = philox.normals_from_key(key, index, height * width * channels)
    noise = noise.view(n, height, width, channels).permute(0, 3, 1, 2)
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    phi = torch.where((index >= 0) & (index < 1 << 32), phi, torch.nan)
    z = mix(images, phi.to(inside), noise.to(inside), flip)
    return z.to(dtype, memory_format=torch.channels_last)
