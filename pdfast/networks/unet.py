"""The U-Net of Salimans & Ho 2022 (that of Nichol & Dhariwal 2021 with BigGAN up- and downsampling)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdfast.diffusion import Prediction, outputs_per_channel
from pdfast.io.bounds import NETWORK
from pdfast.networks.layers import Attention, Conv2d, GroupNorm, Linear, ResBlock, guidance_embedding, time_embedding
from pdfast.networks.network import ModelConfig, Network


@dataclass(frozen=True)
class NetworkConfig(ModelConfig):
    """The shape of a U-Net."""

    image_size: int
    """Height of the images in pixels, and their width where image_width does not say another."""
    image_channels: int
    """1 for grey images, 3 for colour."""
    channels: int
    """Channels at full resolution."""
    channel_mult: tuple[int, ...]
    """Channels at each resolution, as multiples; each entry after the first halves the resolution."""
    num_res_blocks: int
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    attention_resolutions: tuple[int, ...]
    """Sizes in pixels at which each residual block is followed by self-attention (the middle always has it)."""
    head_dim: int
    """Channels of an attention head."""
    emb_channels: int
    """Channels of the time and class embedding."""
    num_groups: int
    """Groups of each group normalisation."""
    prediction: Prediction
    """What the network predicts: x, eps, v, both (x and eps together) or flow (eps - x)."""
    num_classes: int = 0
    """Classes for conditioning; 0 for an unconditional model."""
    image_width: int | None = None
    """Width in pixels, where it is not image_size; attention_resolutions are heights."""
    null_label: int | None = None
    """The label by which it is told no class, num_classes, where it was trained so."""
    guidance: tuple[float, ...] | None = None
    """Of classifier-free guidance inside it: g; or the least and the largest g, where g is an input; None for none."""
    takes_guidance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, bounds in NETWORK.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else [value]:
                if number is not None and number not in bounds:
                    raise ValueError(f"{name} must be {bounds.text}, got {number}")
        if self.channels % 2:
            raise ValueError(f"channels must be even, got {self.channels}: half of the time's embedding are sines")
        if not self.channel_mult:
            raise ValueError("channel_mult must have at least one entry")
        if self.null_label not in (None, self.num_classes or None):
            raise ValueError(f"null_label is num_classes, {self.num_classes}, or none, got {self.null_label}")
        levels = len(self.channel_mult)
        for name, side in (("image_size", self.image_size), ("image_width", self.image_width or self.image_size)):
            if side % 2 ** (levels - 1):
                raise ValueError(f"{name} {side} does not halve {levels - 1} times (channel_mult {self.channel_mult})")
        for width in {self.channels * m for m in self.channel_mult}:
            if width % self.num_groups:
                raise ValueError(f"{width} channels do not divide into num_groups = {self.num_groups}")
            if width % self.head_dim:
                raise ValueError(f"{width} channels do not divide into heads of head_dim = {self.head_dim}")

    def build(self, dropout: float = 0.0) -> "UNet":
        return UNet(self, dropout)


class UNet(Network):
    """What comes before and after its blocks, and the embedding, is float32: near phi = 0 the rounding of a bf16 input would
    be larger than the noise in it."""

    down: Any
    up: Any
    """Of each level, a dictionary: `blocks`, `attentions`, and `downsample` or `upsample`."""

    def __init__(self, config: NetworkConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.prediction = config.prediction
        emb, groups = config.emb_channels, config.num_groups
        width = [config.channels * m for m in config.channel_mult]
        size = [config.image_size >> level for level in range(len(width))]

        def block(in_channels: int, out_channels: int, resample: str = "") -> ResBlock:
            return ResBlock(in_channels, out_channels, emb, groups, dropout, resample)

        def attention(level: int) -> nn.Module:
            wanted = size[level] in config.attention_resolutions
            return Attention(width[level], config.head_dim, groups) if wanted else nn.Identity()

        self.time_mlp = nn.Sequential(Linear(config.channels, emb), nn.SiLU(), Linear(emb, emb))
        self.class_embedding = Linear(config.num_classes, emb) if config.num_classes else None
        ranged = config.guidance is not None and len(config.guidance) == 2
        self.guidance = Linear(config.channels, config.channels, zero_init=True) if ranged else None
        self.conv_in = Conv2d(config.image_channels, width[0], 3)

        last = len(width) - 1
        channels, skips = width[0], [width[0]]
        self.down = nn.ModuleList()
        for level in range(len(width)):
            stage: Any = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(config.num_res_blocks):
                stage["blocks"].append(block(channels, width[level]))
                stage["attentions"].append(attention(level))
                channels = width[level]
                skips.append(channels)
            if level < last:
                stage["downsample"] = block(channels, channels, "down")
                skips.append(channels)
            self.down.append(stage)

        self.mid_block1 = block(channels, channels)
        self.mid_attention = Attention(channels, config.head_dim, groups)
        self.mid_block2 = block(channels, channels)

        self.up = nn.ModuleList()
        for level in reversed(range(len(width))):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(config.num_res_blocks + 1):
                stage["blocks"].append(block(channels + skips.pop(), width[level]))
                stage["attentions"].append(attention(level))
                channels = width[level]
            if level > 0:
                stage["upsample"] = block(channels, channels, "up")
            self.up.append(stage)

        self.norm_out = GroupNorm(groups, channels)
        self.conv_out = Conv2d(
            channels, outputs_per_channel(config.prediction) * config.image_channels, 3, zero_init=True
        )

    def blocks(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, ResBlock | Attention))

    def forward(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor:
        config, emb = self.config, time_embedding(phi, self.config.channels)
        if self.guidance is not None:
            emb = emb + self.guidance(guidance_embedding(cond["guidance"], config.channels))
            cond = cond["label"]
        emb = self.time_mlp(emb)
        if self.class_embedding is not None:
            known = config.num_classes + (config.null_label is not None)  # of the null label nothing is added
            one_hot = F.one_hot(cond, known)[:, : config.num_classes]
            emb = emb + self.class_embedding(one_hot.to(emb.dtype))
        emb = F.silu(emb).to(self.dtype)

        h = self.conv_in(z.float().contiguous(memory_format=torch.channels_last)).to(self.dtype)
        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(block(h, emb))
                skips.append(h)
            if "downsample" in stage:
                h = stage["downsample"](h, emb)
                skips.append(h)

        h = self.mid_block2(self.mid_attention(self.mid_block1(h, emb)), emb)

        for stage in self.up:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(block(h, emb, skips.pop()))
            if "upsample" in stage:
                h = stage["upsample"](h, emb)

        return self.conv_out(self.norm_out(h.float(), silu=True))
