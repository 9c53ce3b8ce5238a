"""The operations as cases, at the shapes that the paper's networks and Stable Diffusion 1.5 have them at, or somebody names.

A case makes the work of a number of samples, on a device, and says how wide its accesses are.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pdfast_kernels
from benchmarks.command import Parser, count
from benchmarks.work import Case, Work
from pdfast_kernels import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPS = 1e-6
GROUPS = 32
STEPS = 128
"""Rows of a step table: few beside the smallest image, which is what tells it from a main tensor (the gate)."""
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
    head_dim: int | None  # None where there are 8 heads
    widths: tuple[int, ...]  # channels of the residual blocks: what a FiLM follows, and attention
    attention: str  # what is normalised without an activation, and attended to: CxS
    norms: str  # what is normalised, CxS


NETWORKS = {
    "cifar10": Network(
        *(128, "bf16", "3x32", 1, 256, (256,), "256x16 256x8"), "256x32 512x32 256x16 512x16 256x8 512x8"
    ),
    "imagenet64": Network(
        *(16, "bf16", "3x64", 2, 64, (192, 384, 576, 768), "384x32 576x16 768x8"),
        "192x64 384x64 576x64 192x32 384x32 576x32 768x32 960x32 384x16 576x16 768x16 960x16 1152x16 1344x16 576x8 768x8 "
        "1344x8 1536x8",
    ),
    "lsun128": Network(
        *(16, "bf16", "3x128", 2, 64, (64, 128, 256, 384, 512), "256x32 384x16 512x8"),
        "64x128 128x128 192x128 64x64 128x64 192x64 256x64 384x64 128x32 256x32 384x32 512x32 640x32 256x16 384x16 512x16 "
        "640x16 768x16 896x16 384x8 512x8 896x8 1024x8",
    ),
    "sd15": Network(  # no FiLM: the embedding is added before
        *(4, "fp16", "4x64", 1, None, (), "320x64 640x32 1280x16 1280x8"),
        "320x64 640x64 960x64 320x32 640x32 960x32 1280x32 1920x32 640x16 1280x16 1920x16 2560x16 1280x8 2560x8",
    ),
}
SMALL_BATCH = "small batch"
SHAPES_OF = {name.replace(" ", "-"): name for name in (*NETWORKS, SMALL_BATCH)}


class Images(NamedTuple):
    """n images of that many channels and size (height, width)."""

    network: str
    """Whose shape it is, "" for nobody's."""
    n: int
    channels: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.n}x{self.channels}x{self.size[0]}" + ("" if self.network else f"x{self.size[1]}")


def _case(
    op: str, network: str, name: str, n: int, make: Callable[[int, str], Work], run: int, dtype: str, **gated: Any
) -> Case:
    """run: how many elements lie together, which says how wide accesses can be."""
    return Case(op, network, f"{network} {name} {dtype}".strip(), n, make, 128 if run % 8 == 0 else 0, **gated)


def _both(op: str, *arguments: Any, **options: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The operation by our kernels and in plain PyTorch."""
    ours, plain = (partial(getattr(of, op), *arguments, **options) for of in (pdfast_kernels, reference))
    return ours, plain


def _image(n: int, channels: int, size: tuple[int, int], dtype: str, device: str, channels_last: bool = True) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.zeros(n, channels, *size, dtype=DTYPES[dtype], device=device).contiguous(memory_format=layout)


def diffuse_case(at: Images, dtype: str, flip: bool = False) -> Case:
    def make(n: int, device: str) -> Work:
        images = torch.zeros(n, *at.size, at.channels, dtype=torch.uint8, device=device)
        phi = torch.zeros(n, device=device)
        key, index = (torch.zeros(k, dtype=torch.int64, device=device) for k in (4, n))
        flips = torch.zeros(n, dtype=torch.bool, device=device) if flip else None

        def plain() -> Tensor:  # with PyTorch's own noise: eager Philox in int64 would flatter us
            noise = torch.randn(images.shape, device=device).permute(0, 3, 1, 2)
            return reference.mix(images, phi, noise, flips).to(DTYPES[dtype])

        given = images, phi, key, index, flips
        return Work(
            kernels=lambda: pdfast_kernels.diffuse(*given, DTYPES[dtype]),
            plain=plain,
            reads=[tensor for tensor in given if tensor is not None],
            same_numbers=lambda: reference.diffuse(*given, torch.float64),
        )

    # Wide are accesses of z; of the images, a byte an element, a thread has 4 or 8 bytes.
    name = f"{at}{' flip' if flip else ''}"
    return _case("diffuse", at.network, name, at.n, make, at.channels * prod(at.size), dtype, narrow=("images_ptr",))


def state_case(op: str, at: Images, dtype: str, parts: int, channels_last: bool = True, huber: float = 0.0) -> Case:
    """op: ddim_step; ddim_step_weighted_loss, of which nothing need be read again, one pass over the tensors gives both; or
    ddim_step_weighted_loss_and_grad, which returns the loss and its gradient at once."""

    def make(n: int, device: str) -> Work:
        def image(channels: int, dtype: str) -> Tensor:
            return _image(n, channels, at.size, dtype, device, channels_last)

        def column(*shape: int) -> Tensor:
            return torch.full((STEPS, *shape), 0.5, device=device)

        index, output = torch.zeros(n, dtype=torch.int64, device=device), image(parts * at.channels, dtype)
        if op == "ddim_step":
            both = [image(at.channels, dtype).requires_grad_(), output.requires_grad_()]
            return Work(*_both(op, *both, column(), column(parts), index), [*both, index], [], both, [index])
        at_once = op.endswith("_and_grad")
        tensors = [output, image(at.channels, "fp32"), *(image(parts * at.channels, dtype) for _ in range(2))]
        columns = column(), *(column(parts) for _ in range(3)), column()
        calls = _both(op, *tensors, *columns, index, huber=huber, **({"grad_scale": 1.0} if at_once else {}))
        return Work(*calls, [*tensors, index], [], [] if at_once else [output.requires_grad_()])

    run = at.channels if channels_last and parts > 1 else at.channels * prod(at.size)
    name = f"{at} P={parts} {'NHWC' if channels_last else 'NCHW'}{' huber' if huber else ''}"
    narrow = ("a_ptr", "b_ptr") if op == "ddim_step" else ()
    return _case(op, at.network, name, at.n, make, run, dtype, narrow=narrow)


def group_norm_case(at: Images, dtype: str, kind: str, groups: int | None = None) -> Case:
    """kind: film+silu, silu or plain."""
    film, silu, groups = kind == "film+silu", kind != "plain", groups or gcd(at.channels, GROUPS)

    def make(n: int, device: str) -> Work:
        x = _image(n, at.channels, at.size, dtype, device).requires_grad_()
        weight, bias = (torch.zeros(at.channels, device=device, requires_grad=True) for _ in range(2))
        both = torch.zeros(n, 2 * at.channels, dtype=DTYPES[dtype], device=device)  # of one linear layer
        scale, shift = (half.requires_grad_() for half in both.chunk(2, dim=1)) if film else (None, None)
        inputs = [x, weight, bias, *([scale, shift] if film else [])]
        calls = _both("group_norm", x, groups, weight, bias, EPS, scale=scale, shift=shift, silu=silu)
        return Work(*calls, inputs, [], inputs, inputs if silu else [x, weight])

    return _case("group_norm", at.network, f"{at} {kind}", at.n, make, at.channels, dtype)


def attention_case(
    network: str, n: int, positions: int, heads: int, head_dim: int, dtype: str, packed: bool = True
) -> Case:
    def make(n: int, device: str) -> Work:
        shape = (n, positions, *((3,) if packed else ()), heads, head_dim)
        options = {"dtype": DTYPES[dtype], "device": device, "requires_grad": True}
        inputs = [torch.zeros(shape, **options) for _ in range(1 if packed else 3)]
        return Work(*_both("attention_packed" if packed else "attention", *inputs), inputs, [], inputs, inputs)

    name, cores = f"{n}x{positions}x{heads}x{head_dim}{' packed' * packed}", dtype != "fp32" and positions >= 64
    return _case("attention", network, name, n, make, head_dim, dtype, tensor_cores=cores)


def attention_block_case(at: Images, dtype: str, heads: int) -> Case:
    def make(n: int, device: str) -> Work:
        c = at.channels
        shapes = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,))
        parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        tensors = [_image(n, c, at.size, dtype, device).requires_grad_(), *parameters]
        calls = _both("group_norm_attention", tensors[0], gcd(c, GROUPS), *parameters, heads)
        return Work(*calls, tensors, [], tensors, tensors)

    cores = dtype != "fp32" and prod(at.size) >= 64
    name = f"{at} heads={heads}"
    return _case("group_norm_attention", at.network, name, at.n, make, at.channels, dtype, tensor_cores=cores)


def adam_ema_case(name: str, sizes: tuple[int, ...], dtype: str, averages: int = 1) -> Case:
    """One step on parameters of these sizes, with gradients of that dtype and one or two averages; there are no samples."""

    def make(n: int, device: str) -> Work:
        states = [[torch.zeros(size, device=device) for size in sizes] for _ in range(3 + averages)]
        gradients = [torch.zeros(size, dtype=DTYPES[dtype], device=device) for size in sizes]
        scalars = torch.tensor([1e-4, 1.0, 1.0, 1e-4, 0.0, 1e-2], device="cpu" if device == "meta" else device)
        second = states[4] if averages == 2 else None
        settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "second_averages": second}
        optimizer = None if device == "meta" else pdfast_kernels.AdamEma(*states[:4], **settings)
        return Work(
            kernels=lambda: optimizer.step(gradients, scalars),
            plain=lambda: reference.adam_ema(*states[:4], gradients, scalars, **settings),
            reads=[*chain(*states), *gradients],
            writes=[*chain(*states)],
        )

    # A thread has 4 elements of everything; where not all sizes are multiples of 4, the kernel decides for each.
    width = (128 if dtype == "fp32" else 64) if all(size % 4 == 0 for size in sizes) else 0
    said = f"{name}, {dtype} gradients{', 2 averages' if averages == 2 else ''}"
    return Case("adam_ema", "", said, 1, make, width)


def sizes(text: str) -> Iterator[tuple[int, ...]]:
    """'256x32 512x8' -> (256, 32), (512, 8)."""
    return (tuple(map(int, size.split("x"))) for size in text.split())


def _square(network: str, n: int, text: str) -> Iterator[Images]:
    """Images of the sizes CxS."""
    return (Images(network, n, channels, (size, size)) for channels, size in sizes(text))


def all_cases() -> list[Case]:
    adam_ema = [adam_ema_case(name, elements, dtype) for dtype in DTYPES for name, elements in PARAMETERS.items()]
    twice = [adam_ema_case(name, elements, "fp32", averages=2) for name, elements in PARAMETERS.items()]
    return [*_states(), *_norms(), *_attention(), *adam_ema, *twice]


def cases_at(shape: tuple[int, int, int, int], head_dim: int) -> Iterator[Case]:
    """All that there can be of images [N, C, H, W], in every dtype: attention over their positions with C / head_dim heads,
    and without it where that is no number; the operations on states with one output a channel. No adam_ema."""
    n, channels, *size = shape
    at, heads = Images("", n, channels, tuple(size)), channels // head_dim
    for dtype in DTYPES:
        yield diffuse_case(at, dtype)
        yield from (state_case(name, at, dtype, 1) for name in STATES)
        yield from (group_norm_case(at, dtype, kind) for kind in ("film+silu", "silu", "plain"))
        if channels % head_dim == 0:
            yield attention_case("", n, size[0] * size[1], heads, head_dim, dtype)
            yield attention_block_case(at, dtype, heads)


def _states() -> Iterator[Case]:
    shapes = [(net.parts, at) for name, net in NETWORKS.items() for at in _square(name, net.samples, net.image)]
    for _, at in shapes:
        yield from (diffuse_case(at, "fp32"), diffuse_case(at, "fp32", flip=True), diffuse_case(at, "bf16"))
    yield diffuse_case(Images(SMALL_BATCH, 1, 3, (32, 32)), "fp16", flip=True)
    for parts, at in shapes:
        yield from (state_case("ddim_step", at, dtype, parts) for dtype in DTYPES)
        yield state_case("ddim_step", at, "fp32", parts, channels_last=False)
        yield state_case("ddim_step", at._replace(n=1), "fp32", parts)
    yield state_case("ddim_step", Images("latents", 16, 8, (32, 32)), "bf16", 2)
    for name in STATES[1:]:
        for parts, at in shapes:
            yield from (state_case(name, at, dtype, parts) for dtype in ("fp32", "bf16"))
            yield state_case(name, at, "bf16", parts, huber=0.01)
            yield state_case(name, at, "fp16", parts, channels_last=False)


def _norms() -> Iterator[Case]:
    for name, net in NETWORKS.items():
        for at in _square(name, net.samples, net.norms):
            yield group_norm_case(at, net.dtype, "film+silu" if at.channels in net.widths else "silu")
        yield from (group_norm_case(at, net.dtype, "plain") for at in _square(name, net.samples, net.attention))
    for dtype in DTYPES:
        for at in _square(SMALL_BATCH, 1, "256x32 192x64 1280x8"):
            yield group_norm_case(at, dtype, "film+silu")


def _attention() -> Iterator[Case]:
    """The attention block at a small batch: its matrix products are computed, here too. Stable Diffusion has another."""
    networks = [(name, net, at) for name, net in NETWORKS.items() for at in _square(name, net.samples, net.attention)]
    for name, net, at in networks:
        heads = at.channels // net.head_dim if net.head_dim else 8
        shape = prod(at.size), heads, at.channels // heads
        yield attention_case(name, net.samples, *shape, net.dtype, packed=name != "sd15")
    for dtype in DTYPES:
        yield from (attention_case(SMALL_BATCH, 1, *shape, dtype) for shape in sizes("16x2x64 64x4x64 1024x2x128"))
    for _, net, at in networks:
        if net.head_dim:
            yield attention_block_case(at._replace(n=2), net.dtype, at.channels // net.head_dim)


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
    """An error where there are none; with --list they are printed, and none is left."""
    cases, shapes = all_cases(), options.shapes or []
    for named in shapes:
        if not isinstance(named, str):
            cases += cases_at(named, options.head_dim)
    cases = [
        replace(case, samples=options.samples or case.samples)
        for case in cases
        if ("all" in options.op or case.op in options.op)
        and case.matches(options.case)
        and (not options.dtype or any(dtype in case.name for dtype in options.dtype))
        and (case.quick or not options.quick)
        and (not shapes or case.network in (*shapes, ""))
    ]
    if not cases:
        parser.error("no such cases; --list names them")
    if "all" not in options.op:
        cases.sort(key=lambda case: options.op.index(case.op))
    if options.list:
        print("\n".join(case.full_name for case in cases))
    return [] if options.list else cases
