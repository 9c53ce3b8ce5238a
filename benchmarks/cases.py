"""The operations at the shapes that the paper's networks and Stable Diffusion 1.5 have them at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import work
from benchmarks.work import Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """An operation at one shape. `width`, `tensor_cores`: see benchmarks.gate."""

    op: str
    name: str
    samples: int
    make: Callable[[int, str], Work]
    """The work for a number of samples, on a device."""
    width: int
    tensor_cores: bool = False
    narrow: tuple[str, ...] = ()
    """Arguments that need no wide accesses all the same."""
    explicit: bool = False
    """Whether somebody asked for this very shape."""

    @property
    def full_name(self) -> str:
        return f"{self.op} {self.name}"

    @property
    def quick(self) -> bool:
        """Whether it is one of the few of --quick."""
        return self.full_name in QUICK

    @property
    def counted(self) -> int:
        """The number of samples at which its bytes are counted; 0: they are not."""
        return COUNTED.get(self.full_name, 0)


# With the samples at which their bytes are counted: few, since the interpreter takes seconds, but enough that weights,
# where there are any, are the lesser part.
QUICK = {
    "diffuse cifar10 128x3x32 flip fp32": 2,
    "ddim_step cifar10 128x3x32 P=1 NHWC fp32": 2,
    "ddim_step imagenet64 16x3x64 P=2 NHWC fp32": 2,
    "ddim_step latents 16x8x32 P=2 NHWC bf16": 2,
    "ddim_step_weighted_loss cifar10 128x3x32 P=1 NHWC fp32": 2,
    "ddim_step_weighted_loss_and_grad cifar10 128x3x32 P=1 NHWC fp32": 2,
    "group_norm cifar10 128x256x16 film+silu bf16": 2,
    "group_norm lsun128 16x64x64 film+silu bf16": 2,
    "group_norm small batch 1x1280x8 film+silu fp32": 2,
    "attention cifar10 128x256x1x256 packed bf16": 2,
    "attention imagenet64 16x64x12x64 packed bf16": 2,
    "attention sd15 4x64x8x160 fp16": 2,
    "attention small batch 1x64x4x64 packed fp32": 2,
    "group_norm_attention cifar10 2x256x8 heads=1 bf16": 8,
    "adam_ema whole vectors, fp32 gradients": 1,
    "adam_ema any sizes, fp32 gradients": 1,
}
COUNTED = QUICK | {
    "ddim_step imagenet64 16x3x64 P=2 NCHW fp32": 2,
    "group_norm imagenet64 16x192x64 film+silu bf16": 2,
    "group_norm sd15 4x320x64 silu fp16": 2,
    "attention imagenet64 16x256x9x64 packed bf16": 2,
    "attention sd15 4x256x8x160 fp16": 2,
    "group_norm_attention cifar10 2x256x16 heads=1 bf16": 8,
}


@dataclass(frozen=True)
class Network:
    """What of a network matters here."""

    samples: int
    """At a time on one GPU."""
    dtype: str
    image: str
    """Of the states, CxS for S x S pixels."""
    parts: int
    """Outputs a channel of the image."""
    widths: tuple[int, ...]
    """Channels of the residual blocks: what a FiLM follows, and attention."""
    norms: str
    """What is normalised, CxS."""
    plain: str
    """What is normalised without an activation, before attention."""
    attention: str
    """(positions)x(heads)x(channels of a head)."""


NETWORKS = {
    "cifar10": Network(
        samples=128,
        dtype="bf16",
        image="3x32",
        parts=1,
        widths=(256,),
        norms="256x32 512x32 256x16 512x16 256x8 512x8",
        plain="256x16 256x8",
        attention="256x1x256 64x1x256",
    ),
    "imagenet64": Network(
        samples=16,
        dtype="bf16",
        image="3x64",
        parts=2,
        widths=(192, 384, 576, 768),
        norms="192x64 384x64 576x64 192x32 384x32 576x32 768x32 960x32 384x16 576x16 768x16 960x16 1152x16 1344x16 "
        "576x8 768x8 1344x8 1536x8",
        plain="384x32 576x16 768x8",
        attention="1024x6x64 256x9x64 64x12x64",
    ),
    "lsun128": Network(
        samples=16,
        dtype="bf16",
        image="3x128",
        parts=2,
        widths=(64, 128, 256, 384, 512),
        norms="64x128 128x128 192x128 64x64 128x64 192x64 256x64 384x64 128x32 256x32 384x32 512x32 640x32 256x16 "
        "384x16 512x16 640x16 768x16 896x16 384x8 512x8 896x8 1024x8",
        plain="256x32 384x16 512x8",
        attention="1024x4x64 256x6x64 64x8x64",
    ),
    "sd15": Network(
        samples=4,
        dtype="fp16",
        image="4x64",
        parts=1,
        widths=(),  # no FiLM: the embedding is added before
        norms="320x64 640x64 960x64 320x32 640x32 960x32 1280x32 1920x32 640x16 1280x16 1920x16 2560x16 1280x8 2560x8",
        plain="320x64 640x32 1280x16 1280x8",
        attention="4096x8x40 1024x8x80 256x8x160 64x8x160",
    ),
}
GROUPS = 32
STEPS = 128
"""Rows of a step table: few beside the smallest image, which is what tells it from a main tensor (benchmarks.gate)."""
PARAMETERS = {
    "whole vectors": (256 * 256 * 3, 256, 1024 * 64),
    "any sizes": (256 * 256 * 3, 256, 6, 1, 1001),
    "large tensors": (1 << 20,) * 16,
}
"""Elements of an optimizer's tensors; where not all are multiples of 4, the kernel decides for each."""


def sizes(text: str) -> Iterator[tuple[int, ...]]:
    """'256x32 512x8' -> (256, 32), (512, 8)."""
    return (tuple(map(int, size.split("x"))) for size in text.split())


def _width(run: int) -> int:
    """Of the accesses where `run` elements lie together."""
    return 128 if run % 8 == 0 else 0


def all_cases() -> list[Case]:
    cases = [
        *_diffuse(),
        *_ddim_step(),
        *_loss(),
        *_group_norm(),
        *_attention(),
        *_group_norm_attention(),
        *_adam_ema(),
    ]
    if unknown := COUNTED.keys() - {case.full_name for case in cases}:
        raise ValueError(f"no such cases: {', '.join(sorted(unknown))}")
    return cases


def _diffuse() -> Iterator[Case]:
    def case(name: str, samples: int, image: str, flip: bool, dtype: str) -> Case:
        [(channels, size)] = sizes(image)
        make = partial(work.diffuse_work, channels=channels, size=(size, size), dtype=DTYPES[dtype], flip=flip)
        width = _width(channels * size * size)  # of z; of the images, a byte an element, a thread has 4 or 8 bytes
        name = f"{name} {samples}x{image} {'flip ' if flip else ''}{dtype}"
        return Case("diffuse", name, samples, make, width, narrow=("images_ptr",))

    for name, network in NETWORKS.items():
        yield case(name, network.samples, network.image, False, "fp32")
        yield case(name, network.samples, network.image, True, "fp32")
        yield case(name, network.samples, network.image, False, "bf16")
    yield case("small batch", 1, "3x32", True, "fp16")


def _states(image: str, parts: int, channels_last: bool, dtype: str) -> tuple[dict, int, str]:
    """Of an operation on states: the arguments of its work, the width of its accesses, and its name."""
    [(channels, size)] = sizes(image)
    run = channels if channels_last and parts > 1 else channels * size * size
    arguments = {"channels": channels, "size": (size, size), "parts": parts, "channels_last": channels_last}
    arguments |= {"dtype": DTYPES[dtype], "steps": STEPS}
    return arguments, _width(run), f"{image} P={parts} {'NHWC' if channels_last else 'NCHW'} {dtype}"


def _ddim_step() -> Iterator[Case]:
    def case(name: str, samples: int, image: str, parts: int, channels_last: bool, dtype: str) -> Case:
        arguments, width, shape = _states(image, parts, channels_last, dtype)
        make = partial(work.ddim_step_work, **arguments)
        return Case("ddim_step", f"{name} {samples}x{shape}", samples, make, width, narrow=("a_ptr", "b_ptr"))

    for name, network in NETWORKS.items():
        for dtype in DTYPES:
            yield case(name, network.samples, network.image, network.parts, True, dtype)
        yield case(name, network.samples, network.image, network.parts, False, "fp32")
        yield case(name, 1, network.image, network.parts, True, "fp32")
    yield case("latents", 16, "8x32", 2, True, "bf16")


def _loss() -> Iterator[Case]:
    def case(name: str, network: Network, and_grad: bool, channels_last: bool, dtype: str) -> Case:
        arguments, width, shape = _states(network.image, network.parts, channels_last, dtype)
        op = f"ddim_step_weighted_loss{'_and_grad' if and_grad else ''}"
        make = partial(work.loss_work, **arguments, and_grad=and_grad)
        return Case(op, f"{name} {network.samples}x{shape}", network.samples, make, width)

    for and_grad in (False, True):
        for name, network in NETWORKS.items():
            yield case(name, network, and_grad, True, "fp32")
            yield case(name, network, and_grad, True, "bf16")
            yield case(name, network, and_grad, False, "fp16")


def _group_norm() -> Iterator[Case]:
    def case(name: str, samples: int, channels: int, size: int, kind: str, dtype: str) -> Case:
        arguments = {"channels": channels, "size": (size, size), "groups": GROUPS, "dtype": DTYPES[dtype]}
        make = partial(work.group_norm_work, **arguments, film=kind == "film+silu", silu=kind != "plain")
        return Case("group_norm", f"{name} {samples}x{channels}x{size} {kind} {dtype}", samples, make, _width(channels))

    for name, network in NETWORKS.items():
        for channels, size in sizes(network.norms):
            kind = "film+silu" if channels in network.widths else "silu"
            yield case(name, network.samples, channels, size, kind, network.dtype)
        for channels, size in sizes(network.plain):
            yield case(name, network.samples, channels, size, "plain", network.dtype)
    for dtype in DTYPES:
        for channels, size in sizes("256x32 192x64 1280x8"):
            yield case("small batch", 1, channels, size, "film+silu", dtype)


def _attention() -> Iterator[Case]:
    def case(name: str, samples: int, positions: int, heads: int, head_dim: int, packed: bool, dtype: str) -> Case:
        arguments = {"positions": positions, "heads": heads, "head_dim": head_dim, "dtype": DTYPES[dtype]}
        make = partial(work.attention_work, **arguments, packed=packed)
        name = f"{name} {samples}x{positions}x{heads}x{head_dim} {'packed ' if packed else ''}{dtype}"
        cores = dtype != "fp32" and positions >= 64
        return Case("attention", name, samples, make, _width(head_dim), tensor_cores=cores)

    for name, network in NETWORKS.items():
        for shape in sizes(network.attention):
            yield case(name, network.samples, *shape, name != "sd15", network.dtype)
    for dtype in DTYPES:
        for shape in sizes("16x2x64 64x4x64 1024x2x128"):
            yield case("small batch", 1, *shape, True, dtype)


def _group_norm_attention() -> Iterator[Case]:
    """At a small batch: its matrix products are computed, here too. Stable Diffusion has a transformer block."""
    for name in ("cifar10", "imagenet64", "lsun128"):
        network = NETWORKS[name]
        for (channels, size), (positions, heads, _) in zip(sizes(network.plain), sizes(network.attention), strict=True):
            arguments = {"channels": channels, "size": (size, size), "groups": GROUPS, "heads": heads}
            make = partial(work.group_norm_attention_work, **arguments, dtype=DTYPES[network.dtype])
            shape = f"{name} 2x{channels}x{size} heads={heads} {network.dtype}"
            yield Case("group_norm_attention", shape, 2, make, _width(channels), tensor_cores=positions >= 64)


def _adam_ema() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, elements in PARAMETERS.items():
            make = partial(work.adam_ema_work, sizes=elements, gradient_dtype=DTYPES[dtype])
            width = 128 if dtype == "fp32" else 64  # a thread has 4 elements of everything
            yield Case("adam_ema", f"{name}, {dtype} gradients", 1, make, width if name != "any sizes" else 0)
