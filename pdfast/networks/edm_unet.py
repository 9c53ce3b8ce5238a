"""The U-Nets of EDM (Karras et al. 2022): DDPM++ and NCSN++ of Song et al. 2021, and ADM of Dhariwal & Nichol 2021.

Parameters have the names of the published weights. This file also lies beside the weights of a pipeline that pdfast
exported: it needs torch and nothing else.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_CHANNELS_OF_GROUP = 4
MOST_GROUPS = 32
ADM_HEAD_DIM = 64
MOST_PIXELS, MOST_CHANNELS, MOST_CLASSES = 1 << 13, 1 << 16, 1 << 20  # a network of more is none
MOST_BLOCKS, MOST_LEVELS, MOST_TAPS = 64, 16, 64


@dataclass(frozen=True)
class EDMUNetConfig:
    """The shape of such a U-Net, in the words of the authors' code where it has them."""

    model_type: Literal["SongUNet", "DhariwalUNet"]
    """SongUNet is DDPM++ and NCSN++, DhariwalUNet is ADM."""
    image_size: int
    """Height and width of the images in pixels."""
    image_channels: int
    """1 for grey images, 3 for colour."""
    num_classes: int
    """Classes for conditioning; 0 for an unconditional model."""
    model_channels: int
    """Channels at full resolution, times the first of `channel_mult`."""
    channel_mult: tuple[int, ...]
    """Channels at each resolution, as multiples; each entry after the first halves the resolution."""
    channel_mult_emb: int
    """Channels of the embedding, as a multiple."""
    num_blocks: int
    """Blocks at each resolution on the way down (one more on the way up)."""
    attn_resolutions: tuple[int, ...]
    """Sizes in pixels at which there is self-attention."""
    channel_mult_noise: int = 1
    """SongUNet: sines and cosines of the noise level, as a multiple."""
    residual: bool = False
    """SongUNet: the image goes down beside the blocks and is added at each resolution (NCSN++)."""
    resample_filter: tuple[int, ...] = (1, 1)
    """SongUNet: the filter, in each direction, that halves and doubles the resolution."""
    fourier: tuple[float, ...] = ()
    """SongUNet: random frequencies of the noise level (NCSN++); without any they are regular."""
    null_label: int | None = None
    """The label by which it is told none of the classes, num_classes, where it was trained so."""
    guidance: tuple[float, ...] | None = None
    """Of classifier-free guidance inside it: g; or the least and the largest g, where g is an input; None for none."""
    takes_guidance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        largest = max(self.channel_mult, default=1)
        for name, least, value, most in (
            ("image_size", 1, self.image_size, MOST_PIXELS),
            ("image_channels", 1, self.image_channels, MOST_CHANNELS),
            ("num_classes", 0, self.num_classes, MOST_CLASSES),
            ("channel_mult", 1, min(self.channel_mult, default=1), MOST_CHANNELS),
            ("model_channels", 1, self.model_channels, MOST_CHANNELS // max(largest, 1)),
            ("channel_mult_emb", 1, self.channel_mult_emb, MOST_CHANNELS // max(self.model_channels, 1)),
            ("channel_mult_noise", 1, self.channel_mult_noise, MOST_CHANNELS // max(self.model_channels, 1)),
            ("num_blocks", 1, self.num_blocks, MOST_BLOCKS),
            ("levels of channel_mult", 1, levels, MOST_LEVELS),
            ("weights of resample_filter", 1, len(self.resample_filter), MOST_TAPS),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        of_noise = self.model_channels * self.channel_mult_noise
        if of_noise % 2 or of_noise < 4:
            raise ValueError(
                f"model_channels {self.model_channels} are too few for sines and cosines of the noise level"
            )
        if self.fourier and not (len(self.fourier) == of_noise // 2 and all(map(math.isfinite, self.fourier))):
            raise ValueError(f"fourier must be {of_noise // 2} finite frequencies")
        for width in {self.model_channels * multiple for multiple in self.channel_mult}:
            if self.model_type == "DhariwalUNet" and width % max(width // ADM_HEAD_DIM, 1):
                raise ValueError(f"{width} channels do not divide into {width // ADM_HEAD_DIM} heads")
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size {self.image_size} does not halve {levels - 1} times (channel_mult {self.channel_mult})"
            )
        if self.null_label not in (None, self.num_classes or None):
            raise ValueError(f"null_label is num_classes, {self.num_classes}, or none, got {self.null_label}")
        if len(self.resample_filter) % 2 or not sum(self.resample_filter):
            raise ValueError(f"resample_filter {self.resample_filter} does not halve: need an even number of weights")


class Conv2d(nn.Conv2d):
    """A same-padded convolution whose parameters are cast to the dtype of its input at use, as in the layers below."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, more_padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2 + more_padding)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(MOST_GROUPS, channels // MIN_CHANNELS_OF_GROUP), channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def upsample(x: Tensor) -> Tensor:
    """Twice the height and width, each pixel four times."""
    if x.device.type == "cpu":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # As in pdfast.networks.layers: without atomics, and channels-last.
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
    return pixels.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Half or twice the resolution, each channel filtered in both directions."""

    kernel: Tensor

    def __init__(self, direction: Literal["up", "down"], taps: tuple[int, ...], padded: bool = True) -> None:
        super().__init__()
        self.up = direction == "up"
        self.plain = tuple(taps) == (1, 1)
        self.padding = (len(taps) - 1) // 2 if padded else 0
        with torch.device("cpu"):  # a table, even where the network is only to be counted
            row = torch.tensor(taps, dtype=torch.float32) / sum(taps) * (2 if self.up else 1)
            self.register_buffer("kernel", row[:, None] * row, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return upsample(x) if self.up else F.avg_pool2d(x, 2)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        resampled = F.conv_transpose2d if self.up else F.conv2d
        return resampled(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


class AuxResidual(Conv2d):
    """Of NCSN++: what goes down beside the blocks, convolved and then halved, with the padding of both at once."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]) -> None:
        super().__init__(in_channels, out_channels, 3, more_padding=(len(taps) - 1) // 2)
        self.halve = Resample("down", taps, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.halve(super().forward(x))


class Block(nn.Module):
    """GroupNorm, SiLU, (resample,) conv; the embedding; GroupNorm, SiLU, dropout, conv; plus the input. Then self-attention,
    where there are heads.

    ADM scales and shifts by the embedding after the second normalisation; the others add it before, and keep the
    variance of each sum of two by sqrt(1/2).
    """

    def __init__(
        self,
        config: EDMUNetConfig,
        in_channels: int,
        out_channels: int,
        dropout: float,
        attention: bool = False,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.film = config.model_type == "DhariwalUNet"
        eps, self.weight_of_sum = (1e-5, 1.0) if self.film else (1e-6, math.sqrt(0.5))
        heads = out_channels // ADM_HEAD_DIM if self.film else 1
        self.heads = heads if attention else 0
        embedding = config.model_channels * config.channel_mult_emb
        self.resample = Resample(resample, config.resample_filter) if resample else nn.Identity()
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3)
        self.affine = Linear(embedding, out_channels * (2 if self.film else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        projected = in_channels != out_channels or (resample is not None and not self.film)
        self.skip = Conv2d(in_channels, out_channels, 1) if projected else nn.Identity()
        if self.heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        of_emb = self.affine(emb)[:, :, None, None]
        if self.film:
            scale, shift = of_emb.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + of_emb)
        h = self.conv1(self.dropout(F.silu(h)))
        h = (self.skip(self.resample(x)) + h) * self.weight_of_sum
        return (h + self._attended(h)) * self.weight_of_sum if self.heads else h

    def _attended(self, h: Tensor) -> Tensor:
        """The channels of queries, keys and values alternate here."""
        qkv = self.qkv(self.norm2(h)).flatten(2).unflatten(1, (self.heads, -1, 3))  # [N, heads, head_dim, 3, H W]
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(h.shape))


class EDMUNet(nn.Module):
    """`unet(x, noise, labels) -> F`: x [N, C, H, W], noise log(sigma) / 4 [N], labels int64 [N] or None (for none of the
    classes) to float32 [N, C, H, W]. Where guidance is an input, labels are {"label": ..., "guidance": g float32 [N]}.

    What comes before and after its blocks, and the embedding, is float32.
    """

    frequencies: Tensor
    dtype: torch.dtype
    """Of the activations of the blocks."""

    def __init__(self, config: EDMUNetConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.adm = adm = config.model_type == "DhariwalUNet"
        widths = [config.model_channels * multiple for multiple in config.channel_mult]
        sizes = [config.image_size >> level for level in range(len(widths))]
        of_noise, of_emb = (config.model_channels * m for m in (config.channel_mult_noise, config.channel_mult_emb))

        with torch.device("cpu"):
            if config.fourier:
                frequencies = 2 * math.pi * torch.tensor(config.fourier, dtype=torch.float64)
            else:
                half = of_noise // 2
                steps = torch.arange(half, dtype=torch.float64) / (half if adm else half - 1)
                frequencies = 10000**-steps
            self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.map_label = (
            Linear(config.num_classes, of_emb if adm else of_noise, bias=not adm) if config.num_classes else None
        )
        self.guidance = Linear(of_noise, of_noise) if config.guidance and len(config.guidance) == 2 else None
        self.map_layer0 = Linear(of_noise, of_emb)
        self.map_layer1 = Linear(of_emb, of_emb)

        channels = widths[0] if adm else config.model_channels
        skips, beside = [channels], config.image_channels
        self.enc = nn.ModuleDict()
        self.enc[f"{sizes[0]}x{sizes[0]}_conv"] = Conv2d(config.image_channels, channels, 3)
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if level:
                self.enc[f"{size}x{size}_down"] = Block(config, channels, channels, dropout, resample="down")
                if config.residual:
                    self.enc[f"{size}x{size}_aux_residual"] = AuxResidual(beside, channels, config.resample_filter)
                    beside = channels
                skips.append(channels)
            for i in range(config.num_blocks):
                attention = size in config.attn_resolutions
                self.enc[f"{size}x{size}_block{i}"] = Block(config, channels, width, dropout, attention)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        size = sizes[-1]
        self.dec[f"{size}x{size}_in0"] = Block(config, channels, channels, dropout, attention=True)
        self.dec[f"{size}x{size}_in1"] = Block(config, channels, channels, dropout)
        for size, width in reversed(list(zip(sizes, widths, strict=True))):
            if size != sizes[-1]:
                self.dec[f"{size}x{size}_up"] = Block(config, channels, channels, dropout, resample="up")
            for i in range(config.num_blocks + 1):
                attention = size in config.attn_resolutions and (adm or i == config.num_blocks)
                self.dec[f"{size}x{size}_block{i}"] = Block(config, channels + skips.pop(), width, dropout, attention)
                channels = width

        out_norm, out_conv = GroupNorm(channels, 1e-5 if adm else 1e-6), Conv2d(channels, config.image_channels, 3)
        if adm:
            self.out_norm, self.out_conv = out_norm, out_conv
        else:
            self.dec[f"{size}x{size}_aux_norm"], self.dec[f"{size}x{size}_aux_conv"] = out_norm, out_conv

    def blocks(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, Block))

    def forward(self, x: Tensor, noise: Tensor, labels: Any = None) -> Tensor:
        dtype = self.dtype
        emb = self._embedding(noise.float(), labels).to(dtype)
        aux = x.float()
        h, skips = aux, list[Tensor]()
        for module in self.enc.values():
            if isinstance(module, AuxResidual):
                h = aux = (skips.pop() + module(aux).to(dtype)) * math.sqrt(0.5)
            elif isinstance(module, Block):
                h = module(h, emb)
            else:
                h = module(h).to(dtype)
            skips.append(h)

        head = []
        for name, module in self.dec.items():
            if not isinstance(module, Block):
                head.append(module)
                continue
            if "_block" in name:
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h, emb)
        norm, conv = (self.out_norm, self.out_conv) if self.adm else head
        return conv(F.silu(norm(h.float())))

    def waves(self, value: Tensor) -> Tensor:
        """Return sines and cosines of a value [N] at the network's frequencies: float32 [N, ...]."""
        angle = value[:, None] * self.frequencies
        return torch.cat((angle.cos(), angle.sin()) if self.adm else (angle.sin(), angle.cos()), dim=1)

    def _embedding(self, noise: Tensor, labels: Any) -> Tensor:
        emb = self.waves(noise)
        if self.guidance is not None:
            emb = emb + self.guidance(self.waves(labels["guidance"] - 1))
            labels = labels["label"]
        classes, known = self.config.num_classes, self.config.num_classes + (self.config.null_label is not None)
        of_label: Tensor | float = 0.0
        if self.map_label is not None:
            one_hot = emb.new_zeros(len(emb), classes)
            if labels is not None:
                one_hot = F.one_hot(labels, known)[:, :classes].to(emb.dtype)
            of_label = self.map_label(one_hot if self.adm else one_hot * math.sqrt(classes))
        if self.adm:
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))) + of_label)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb + of_label))))
