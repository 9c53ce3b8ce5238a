"""The operations at the shapes that the paper's networks and Stable Diffusion 1.5 have them at, or somebody names."""

import argparse
import fnmatch
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from benchmarks import operations as op
from benchmarks.command import Parser, count
from benchmarks.operations import DTYPES, Size
from benchmarks.work import Case

STATES = ("ddim_step", "ddim_step_weighted_loss", "ddim_step_weighted_loss_and_grad")
PARAMETERS = {
    "whole vectors": (256 * 256 * 3, 256, 1024 * 64),
    "any sizes": (256 * 256 * 3, 256, 6, 1, 1001),
    "large tensors": (1 << 20,) * 16,
}
"""Elements of an optimizer's tensors."""


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
SHAPES_OF = {name.replace(" ", "-"): name for name in (*NETWORKS, SMALL_BATCH)}


def sizes(text: str) -> Iterator[tuple[int, ...]]:
    """'256x32 512x8' -> (256, 32), (512, 8)."""
    return (tuple(map(int, size.split("x"))) for size in text.split())


def all_cases() -> list[Case]:
    adam_ema = [op.adam_ema_case(name, elements, dtype) for dtype in DTYPES for name, elements in PARAMETERS.items()]
    return [*_states(), *_norms(), *_attention(), *adam_ema]


def cases_at(shape: tuple[int, int, int, int], head_dim: int) -> Iterator[Case]:
    """All that there can be of images [N, C, H, W], in every dtype: attention over their positions with C / head_dim heads,
    and without it where that is no number; the operations on states with one output a channel. No adam_ema."""
    n, channels, *size = shape
    at = "", n, channels, tuple(size)
    for dtype in DTYPES:
        yield op.diffuse_case(*at, dtype)
        yield from (op.state_case(name, *at, dtype, 1) for name in STATES)
        yield from (op.group_norm_case(*at, dtype, kind) for kind in ("film+silu", "silu", "plain"))
        if channels % head_dim == 0:
            yield op.attention_case("", n, size[0] * size[1], channels // head_dim, head_dim, dtype)
            yield op.attention_block_case(*at, dtype, channels // head_dim)


def _states() -> Iterator[Case]:
    shapes: list[tuple[int, tuple[str, int, int, Size]]] = []  # outputs a channel; network, samples, channels, size
    for name, network in NETWORKS.items():
        [(channels, size)] = sizes(network.image)
        shapes.append((network.parts, (name, network.samples, channels, (size, size))))
    for _, at in shapes:
        yield from (op.diffuse_case(*at, "fp32"), op.diffuse_case(*at, "fp32", flip=True), op.diffuse_case(*at, "bf16"))
    yield op.diffuse_case(SMALL_BATCH, 1, 3, (32, 32), "fp16", flip=True)
    for parts, at in shapes:
        yield from (op.state_case("ddim_step", *at, dtype, parts) for dtype in DTYPES)
        yield op.state_case("ddim_step", *at, "fp32", parts, channels_last=False)
        yield op.state_case("ddim_step", at[0], 1, *at[2:], "fp32", parts)
    yield op.state_case("ddim_step", "latents", 16, 8, (32, 32), "bf16", 2)
    for name in STATES[1:]:
        for parts, at in shapes:
            yield from (op.state_case(name, *at, dtype, parts) for dtype in ("fp32", "bf16"))
            yield op.state_case(name, *at, "fp16", parts, channels_last=False)


def _norms() -> Iterator[Case]:
    for name, network in NETWORKS.items():
        for channels, size in sizes(network.norms):
            kind = "film+silu" if channels in network.widths else "silu"
            yield op.group_norm_case(name, network.samples, channels, (size, size), network.dtype, kind)
        for channels, size in sizes(network.plain):
            yield op.group_norm_case(name, network.samples, channels, (size, size), network.dtype, "plain")
    for dtype in DTYPES:
        for channels, size in sizes("256x32 192x64 1280x8"):
            yield op.group_norm_case(SMALL_BATCH, 1, channels, (size, size), dtype, "film+silu")


def _attention() -> Iterator[Case]:
    """The attention block at a small batch: its matrix products are computed, here too. Stable Diffusion has another."""
    for name, network in NETWORKS.items():
        for shape in sizes(network.attention):
            yield op.attention_case(name, network.samples, *shape, network.dtype, packed=name != "sd15")
    for dtype in DTYPES:
        yield from (op.attention_case(SMALL_BATCH, 1, *shape, dtype) for shape in sizes("16x2x64 64x4x64 1024x2x128"))
    for name, network in [*NETWORKS.items()][:3]:
        for (channels, size), (_, heads, _) in zip(sizes(network.plain), sizes(network.attention), strict=True):
            yield op.attention_block_case(name, 2, channels, (size, size), network.dtype, heads)


def _named_shape(text: str) -> str | tuple[int, ...]:
    """A network's name, or N,C,H,W."""
    if text in SHAPES_OF:
        return SHAPES_OF[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: say {', '.join(SHAPES_OF)} or N,C,H,W, such as 128,256,16,16")
    return tuple(map(int, parts))


def add_choice_of_cases(parser: Parser) -> None:
    ops = list(dict.fromkeys(case.op for case in all_cases()))
    parser.add_argument("--op", nargs="+", choices=[*ops, "all"], default=["all"], help="in this order")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="of the names that --list prints")
    said = f"of these networks ({', '.join(SHAPES_OF)}), or N,C,H,W: images of that shape, and attention over their "
    said += "positions. adam_ema has none and is not chosen by it"
    parser.add_argument("--shapes", nargs="+", type=_named_shape, metavar="SHAPE", help=said)
    parser.add_argument("--head-dim", type=count, default=64, metavar="D", help="of attention at N,C,H,W: C/D heads")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="all unless said")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each operation")
    parser.add_argument("--samples", type=count, metavar="N", help="another batch size than the case's")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and nothing else")


def chosen_cases(parser: Parser, options: argparse.Namespace) -> list[Case]:
    """An error where there are none."""
    cases, shapes = all_cases(), options.shapes or []
    for named in shapes:
        if not isinstance(named, str):
            cases += cases_at(named, options.head_dim)
    cases = [
        replace(case, samples=options.samples or case.samples)
        for case in cases
        if ("all" in options.op or case.op in options.op)
        and any(fnmatch.fnmatch(case.full_name, pattern) for pattern in options.case)
        and (not options.dtype or any(dtype in case.name for dtype in options.dtype))
        and (case.quick or not options.quick)
        and (not shapes or case.network in (*shapes, ""))
    ]
    if not cases:
        parser.error("no such cases; --list names them")
    return cases if "all" in options.op else sorted(cases, key=lambda case: options.op.index(case.op))
