"""The parts of the U-Net. Images are [N, C, H, W] with channels-last strides everywhere.

Parameters are cast to the dtype of the activations at use: on whatever processes they lie, the values are the same. Those of the
norms are rounded to it and stay float32, since their gradients are sums over whole images, which bf16 would round.

Weights are initialised as in the authors' Flax code: LeCun-normal kernels, zero biases, and zero where a residual branch
or the network ends.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from pdfast.networks import few_channels
from pdfast_kernels import group_norm, group_norm_attention

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut at +-2


def _init(weight: Tensor, fan_in: int, zero: bool) -> None:
    if zero:
        nn.init.zeros_(weight)
    else:
        std = math.sqrt(1 / fan_in) / _TRUNCATED_STD
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _rounded(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the parameter rounded to `dtype`, in its own dtype: the gradient passes as it is."""
    if parameter.dtype == dtype:
        return parameter
    return parameter + (parameter.to(dtype).to(parameter.dtype) - parameter).detach()  # exact


class Conv2d(nn.Module):
    """A same-padded convolution whose weight is stored contiguous as [out, height, width, in].

    `fully_shard` accepts only contiguous parameters; conv2d gets the channels-last view of it, without a copy. Weight and
    bias are cast to the dtype of the input at use, as in `Linear`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, zero_init: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, kernel_size, kernel_size, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        _init(self.weight, in_channels * kernel_size**2, zero_init)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if few_channels.wanted(x, weight):
            return few_channels.convolution(x, weight, bias)
        return F.conv2d(x, weight.permute(0, 3, 1, 2), bias, padding=self.weight.shape[1] // 2)


class Linear(nn.Linear):
    """A dense layer with the authors' initialisation."""

    def __init__(self, in_features: int, out_features: int, zero_init: bool = False) -> None:
        super().__init__(in_features, out_features)
        _init(self.weight, in_features, zero_init)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class GroupNorm(nn.GroupNorm):
    """Group normalisation with the authors' eps; then FiLM by scale and shift [N, C] where given, and SiLU if asked for."""

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False
    ) -> Tensor:
        weight, bias = _rounded(self.weight, x.dtype), _rounded(self.bias, x.dtype)
        return group_norm(x, self.num_groups, weight, bias, self.eps, scale=scale, shift=shift, silu=silu)


def _sinusoids(value: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequency = torch.exp(
        torch.arange(half, device=value.device, dtype=torch.float32) * (-math.log(10000) / (half - 1))
    )
    angle = value[:, None] * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


def time_embedding(phi: Tensor, dim: int) -> Tensor:
    """Return sines and cosines of 1000 phi / (pi/2) at dim/2 frequencies from 1 to 1/10000: float32 [N, dim] for phi [N]."""
    return _sinusoids(phi.float() * (1000 / (math.pi / 2)), dim)


def guidance_embedding(g: Tensor, dim: int) -> Tensor:
    """Return sines and cosines of 1000 (g - 1) at the frequencies of `time_embedding`, as diffusers embeds a `guidance_scale`: float32
    [N, dim] for g [N]."""
    return _sinusoids(1000 * (g.float() - 1), dim)


def upsample(x: Tensor) -> Tensor:
    """Twice the height and width, each pixel four times."""
    if x.device.type == "cpu":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # Compiled for a GPU, the gradient of `interpolate` is added up by atomics, in another order in every run, in NCHW and
    # float32; that of `repeat` is a sum.
    return rearrange(repeat(x, "n c h w -> n (h two) (w too) c", two=2, too=2), "n h w c -> n c h w")


class Upsample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return upsample(x)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, (resample,) conv, FiLM by the embedding, SiLU, dropout, zero-initialised conv; plus the input, which a skip is part of
    where one is given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        num_groups: int,
        dropout: float,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3)
        self.film = Linear(emb_channels, 2 * out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, zero_init=True)
        self.shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.resample = {"": nn.Identity(), "down": nn.AvgPool2d(2), "up": Upsample()}[resample]

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:  # here, so that what is compiled has the two gradients apart from the start
            x = torch.cat([x, skip], dim=1)
        h = self.resample(self.norm1(x, silu=True))
        h = self.conv1(h)
        scale, shift = self.film(emb).chunk(2, dim=1)
        h = self.norm2(h, scale, shift, silu=True)
        h = self.conv2(self.dropout(h))
        return self.shortcut(self.resample(x)) + h


class Attention(nn.Module):
    """GroupNorm, self-attention over the H*W positions, zero-initialised projection; plus the input."""

    def __init__(self, channels: int, head_dim: int, num_groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = GroupNorm(num_groups, channels)
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        norm, qkv, proj = self.norm, self.qkv, self.proj
        parameters = qkv.weight, qkv.bias, proj.weight, proj.bias
        w_norm, b_norm = _rounded(norm.weight, x.dtype), _rounded(norm.bias, x.dtype)
        w_qkv, b_qkv, w_proj, b_proj = (parameter.to(x.dtype) for parameter in parameters)
        heads = x.shape[1] // self.head_dim
        return group_norm_attention(x, norm.num_groups, w_norm, b_norm, w_qkv, b_qkv, w_proj, b_proj, heads, norm.eps)
