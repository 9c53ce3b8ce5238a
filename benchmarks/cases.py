"""The operations at the shapes that the paper's networks and Stable Diffusion 1.5 have them at, or somebody names."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch

from benchmarks import work
from benchmarks.work import Size, Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS = 32
STEPS = 128
"""Rows of a step table: few beside the smallest image, which is what tells it from a main tensor (benchmarks.gate)."""
PARAMETERS = {
    "whole vectors": (256 * 256 * 3, 256, 1024 * 64),
    "any sizes": (256 * 256 * 3, 256, 6, 1, 1001),
    "large tensors": (1 << 20,) * 16,
}
"""Elements of an optimizer's tensors; where not all are multiples of 4, the kernel decides for each."""


@dataclass(frozen=True)
class Case:
    """An operation at one shape. `width`, `tensor_cores`: see benchmarks.gate."""

    op: str
    network: str
    """Of NETWORKS, or SMALL_BATCH; empty where the shape is nobody's: one that was named, or an optimizer's."""
    name: str
    samples: int
    make: Callable[[int, str], Work]
    """The work for a number of samples, on a device."""
    width: int
    tensor_cores: bool = False
    narrow: tuple[str, ...] = ()
    """Arguments that need no wide accesses all the same."""

    @property
    def full_name(self) -> str:
        return f"{self.op} {self.name}"

    @property
    def quick(self) -> bool:
        """Whether it is one of the few of --quick."""
        return self.full_name in QUICK

    @property
    def counted(self) -> int:
        """The number of samples at which its bytes are counted; 0: they are not. Few, since the interpreter takes seconds,
        but enough that weights, where there are any, are the lesser part."""
        few = {"group_norm_attention": 8, "adam_ema": 1}.get(self.op, 2)
        return few if self.full_name in (*QUICK, *COUNTED_TOO) else 0


QUICK = (
    "diffuse cifar10 128x3x32 flip fp32",
    "ddim_step cifar10 128x3x32 P=1 NHWC fp32",
    "ddim_step imagenet64 16x3x64 P=2 NHWC fp32",
    "ddim_step latents 16x8x32 P=2 NHWC bf16",
    "ddim_step_weighted_loss cifar10 128x3x32 P=1 NHWC fp32",
    "ddim_step_weighted_loss_and_grad cifar10 128x3x32 P=1 NHWC fp32",
    "group_norm cifar10 128x256x16 film+silu bf16",
    "group_norm lsun128 16x64x64 film+silu bf16",
    "group_norm small batch 1x1280x8 film+silu fp32",
    "attention cifar10 128x256x1x256 packed bf16",
    "attention imagenet64 16x64x12x64 packed bf16",
    "attention sd15 4x64x8x160 fp16",
    "attention small batch 1x64x4x64 packed fp32",
    "group_norm_attention cifar10 2x256x8 heads=1 bf16",
    "adam_ema whole vectors, fp32 gradients",
    "adam_ema any sizes, fp32 gradients",
)
COUNTED_TOO = (
    "ddim_step imagenet64 16x3x64 P=2 NCHW fp32",
    "group_norm imagenet64 16x192x64 film+silu bf16",
    "group_norm sd15 4x320x64 silu fp16",
    "attention imagenet64 16x256x9x64 packed bf16",
    "attention sd15 4x256x8x160 fp16",
    "group_norm_attention cifar10 2x256x16 heads=1 bf16",
)


class Network(NamedTuple):
    """What of a network matters here."""

    samples: int  # at a time on one GPU
    dtype: str
    image: str  # the states, CxS for S x S pixels
    parts: int  # outputs a channel of the image
    widths: tuple[int, ...]  # channels of the residual blocks: what a FiLM follows, and attention
    plain: str  # what is normalised without an activation, before attention: CxS
    attention: str  # (positions)x(heads)x(channels of a head)
    norms: str  # what is normalised, CxS


NETWORKS = {
    "cifar10": Network(
        *(128, "bf16", "3x32", 1, (256,), "256x16 256x8", "256x1x256 64x1x256"),
        norms="256x32 512x32 256x16 512x16 256x8 512x8",
    ),
    "imagenet64": Network(
        *(16, "bf16", "3x64", 2, (192, 384, 576, 768), "384x32 576x16 768x8", "1024x6x64 256x9x64 64x12x64"),
        norms="192x64 384x64 576x64 192x32 384x32 576x32 768x32 960x32 384x16 576x16 768x16 960x16 1152x16 1344x16 "
        "576x8 768x8 1344x8 1536x8",
    ),
    "lsun128": Network(
        *(16, "bf16", "3x128", 2, (64, 128, 256, 384, 512), "256x32 384x16 512x8", "1024x4x64 256x6x64 64x8x64"),
        norms="64x128 128x128 192x128 64x64 128x64 192x64 256x64 384x64 128x32 256x32 384x32 512x32 640x32 256x16 "
        "384x16 512x16 640x16 768x16 896x16 384x8 512x8 896x8 1024x8",
    ),
    "sd15": Network(  # no FiLM: the embedding is added before
        *(4, "fp16", "4x64", 1, (), "320x64 640x32 1280x16 1280x8", "4096x8x40 1024x8x80 256x8x160 64x8x160"),
        norms="320x64 640x64 960x64 320x32 640x32 960x32 1280x32 1920x32 640x16 1280x16 1920x16 2560x16 1280x8 2560x8",
    ),
}
SMALL_BATCH = "small batch"


def sizes(text: str) -> Iterator[tuple[int, ...]]:
    """'256x32 512x8' -> (256, 32), (512, 8)."""
    return (tuple(map(int, size.split("x"))) for size in text.split())


def all_cases() -> list[Case]:
    cases = [*_diffuse_cases(), *_ddim_step_cases(), *_loss_cases()]
    cases += [*_group_norm_cases(), *_attention_cases(), *_adam_ema_cases()]
    if unknown := {*QUICK, *COUNTED_TOO} - {case.full_name for case in cases}:
        raise ValueError(f"no such cases: {', '.join(sorted(unknown))}")
    return cases


def cases_at(shape: tuple[int, int, int, int], head_dim: int) -> Iterator[Case]:
    """All that there can be of images [N, C, H, W], in every dtype: attention over their positions with C / head_dim heads,
    and without it where that is no number; the operations on states with one output a channel. No adam_ema."""
    n, channels, *size = shape
    at = "", n, channels, tuple(size)
    for dtype in DTYPES:
        yield _diffuse(*at, dtype)
        yield from (_state(op, *at, dtype, 1) for op in STATES)
        yield from (_group_norm(*at, dtype, kind) for kind in ("film+silu", "silu", "plain"))
        if channels % head_dim == 0:
            yield _attention("", n, size[0] * size[1], channels // head_dim, head_dim, dtype)
            yield _attention_block(*at, dtype, channels // head_dim)


def _case(op: str, network: str, name: str, samples: int, make: Any, run: int, dtype: str, **gated: Any) -> Case:
    """run: how many elements lie together, which says how wide accesses can be."""
    name = f"{network} {name} {dtype}".strip()
    make = partial(make, dtype=DTYPES[dtype])
    return Case(op, network, name, samples, make, 128 if run % 8 == 0 else 0, **gated)


def _shape(network: str, n: int, channels: int, size: Size) -> str:
    return f"{n}x{channels}x{size[0]}" + ("" if network else f"x{size[1]}")


def _diffuse(network: str, n: int, channels: int, size: Size, dtype: str, flip: bool = False) -> Case:
    make = partial(work.diffuse_work, channels=channels, size=size, flip=flip)
    name, run = f"{_shape(network, n, channels, size)}{' flip' if flip else ''}", channels * size[0] * size[1]
    # Wide are accesses of z; of the images, a byte an element, a thread has 4 or 8 bytes.
    return _case("diffuse", network, name, n, make, run, dtype, narrow=("images_ptr",))


STATES: dict[str, tuple[Callable[..., Work], tuple[str, ...]]] = {
    "ddim_step": (work.ddim_step_work, ("a_ptr", "b_ptr")),
    "ddim_step_weighted_loss": (partial(work.loss_work, and_grad=False), ()),
    "ddim_step_weighted_loss_and_grad": (partial(work.loss_work, and_grad=True), ()),
}
"""Operations on states: the work, and the arguments that need no wide accesses."""


def _state(
    op: str, network: str, n: int, channels: int, size: Size, dtype: str, parts: int, channels_last: bool = True
) -> Case:
    make, narrow = STATES[op]
    make = partial(make, channels=channels, size=size, parts=parts, channels_last=channels_last, steps=STEPS)
    run = channels if channels_last and parts > 1 else channels * size[0] * size[1]
    name = f"{_shape(network, n, channels, size)} P={parts} {'NHWC' if channels_last else 'NCHW'}"
    return _case(op, network, name, n, make, run, dtype, narrow=narrow)


def _group_norm(network: str, n: int, channels: int, size: Size, dtype: str, kind: str) -> Case:
    make = partial(work.group_norm_work, channels=channels, size=size, groups=gcd(channels, GROUPS))
    make = partial(make, film=kind == "film+silu", silu=kind != "plain")
    return _case("group_norm", network, f"{_shape(network, n, channels, size)} {kind}", n, make, channels, dtype)


def _attention(network: str, n: int, positions: int, heads: int, dim: int, dtype: str, packed: bool = True) -> Case:
    make = partial(work.attention_work, positions=positions, heads=heads, head_dim=dim, packed=packed)
    name, cores = f"{n}x{positions}x{heads}x{dim}{' packed' if packed else ''}", dtype != "fp32" and positions >= 64
    return _case("attention", network, name, n, make, dim, dtype, tensor_cores=cores)


def _attention_block(network: str, n: int, channels: int, size: Size, dtype: str, heads: int) -> Case:
    make = partial(work.group_norm_attention_work, channels=channels, size=size, heads=heads)
    make = partial(make, groups=gcd(channels, GROUPS))
    name, cores = f"{_shape(network, n, channels, size)} heads={heads}", dtype != "fp32" and size[0] * size[1] >= 64
    return _case("group_norm_attention", network, name, n, make, channels, dtype, tensor_cores=cores)


def _images() -> Iterator[tuple[str, Network, tuple[str, int, int, Size]]]:
    for name, network in NETWORKS.items():
        [(channels, size)] = sizes(network.image)
        yield name, network, (name, network.samples, channels, (size, size))


def _diffuse_cases() -> Iterator[Case]:
    for *_, at in _images():
        yield from (_diffuse(*at, "fp32"), _diffuse(*at, "fp32", flip=True), _diffuse(*at, "bf16"))
    yield _diffuse(SMALL_BATCH, 1, 3, (32, 32), "fp16", flip=True)


def _ddim_step_cases() -> Iterator[Case]:
    for name, network, at in _images():
        yield from (_state("ddim_step", *at, dtype, network.parts) for dtype in DTYPES)
        yield _state("ddim_step", *at, "fp32", network.parts, channels_last=False)
        yield _state("ddim_step", name, 1, *at[2:], "fp32", network.parts)
    yield _state("ddim_step", "latents", 16, 8, (32, 32), "bf16", 2)


def _loss_cases() -> Iterator[Case]:
    for op in [*STATES][1:]:
        for _, network, at in _images():
            yield from (_state(op, *at, dtype, network.parts) for dtype in ("fp32", "bf16"))
            yield _state(op, *at, "fp16", network.parts, channels_last=False)


def _group_norm_cases() -> Iterator[Case]:
    for name, network in NETWORKS.items():
        for channels, size in sizes(network.norms):
            kind = "film+silu" if channels in network.widths else "silu"
            yield _group_norm(name, network.samples, channels, (size, size), network.dtype, kind)
        for channels, size in sizes(network.plain):
            yield _group_norm(name, network.samples, channels, (size, size), network.dtype, "plain")
    for dtype in DTYPES:
        for channels, size in sizes("256x32 192x64 1280x8"):
            yield _group_norm(SMALL_BATCH, 1, channels, (size, size), dtype, "film+silu")


def _attention_cases() -> Iterator[Case]:
    """The attention block at a small batch: its matrix products are computed, here too. Stable Diffusion has another."""
    for name, network in NETWORKS.items():
        for shape in sizes(network.attention):
            yield _attention(name, network.samples, *shape, network.dtype, packed=name != "sd15")
    for dtype in DTYPES:
        yield from (_attention(SMALL_BATCH, 1, *shape, dtype) for shape in sizes("16x2x64 64x4x64 1024x2x128"))
    for name, network in [*NETWORKS.items()][:3]:
        for (channels, size), (_, heads, _) in zip(sizes(network.plain), sizes(network.attention), strict=True):
            yield _attention_block(name, 2, channels, (size, size), network.dtype, heads)


def _adam_ema_cases() -> Iterator[Case]:
    for dtype, of in DTYPES.items():
        for name, elements in PARAMETERS.items():
            width = (
                0 if name == "any sizes" else 128 if dtype == "fp32" else 64
            )  # a thread has 4 elements of everything
            make = partial(work.adam_ema_work, sizes=elements, gradient_dtype=of)
            yield Case("adam_ema", "", f"{name}, {dtype} gradients", 1, make, width)
