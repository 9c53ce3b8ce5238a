"""The operations as cases: each makes the work of a number of samples, on a device, and says how wide its accesses are.

network: whose shape it is, "" for nobody's. size: (height, width). dtype: of DTYPES.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from math import gcd
from typing import Any

import torch
from torch import Tensor

from benchmarks.work import Case, Work
from pdfast_kernels import reference
from pdfast_kernels.ops.adam_ema.adam_ema import AdamEma
from pdfast_kernels.ops.attention.attention import attention, attention_packed
from pdfast_kernels.ops.ddim_step.ddim_step import ddim_step
from pdfast_kernels.ops.ddim_step_weighted_loss.ddim_step_weighted_loss import (
    ddim_step_weighted_loss,
    ddim_step_weighted_loss_and_grad,
)
from pdfast_kernels.ops.diffuse.diffuse import diffuse
from pdfast_kernels.ops.group_norm.group_norm import group_norm
from pdfast_kernels.ops.group_norm_attention.group_norm_attention import group_norm_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPS = 1e-6
GROUPS = 32
STEPS = 128
"""Rows of a step table: few beside the smallest image, which is what tells it from a main tensor (the gate)."""

Size = tuple[int, int]
Make = Callable[[int, str], Work]


def _case(op: str, network: str, name: str, n: int, make: Make, run: int, dtype: str, **gated: Any) -> Case:
    """run: how many elements lie together, which says how wide accesses can be."""
    return Case(op, network, f"{network} {name} {dtype}".strip(), n, make, 128 if run % 8 == 0 else 0, **gated)


def _shape(network: str, n: int, channels: int, size: Size) -> str:
    return f"{n}x{channels}x{size[0]}" + ("" if network else f"x{size[1]}")


def _image(n: int, channels: int, size: Size, dtype: str, device: str, channels_last: bool = True) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.zeros(n, channels, *size, dtype=DTYPES[dtype], device=device).contiguous(memory_format=layout)


def diffuse_case(network: str, n: int, channels: int, size: Size, dtype: str, flip: bool = False) -> Case:
    def make(n: int, device: str) -> Work:
        images, phi = torch.zeros(n, *size, channels, dtype=torch.uint8, device=device), torch.zeros(n, device=device)
        flips = torch.zeros(n, dtype=torch.bool, device=device) if flip else None
        key, index = (torch.zeros(k, dtype=torch.int64, device=device) for k in (4, n))

        def plain() -> Tensor:  # with PyTorch's own noise: eager Philox in int64 would flatter us
            noise = torch.randn(images.shape, device=device).permute(0, 3, 1, 2)
            return reference.mix(images, phi, noise, flips).to(DTYPES[dtype])

        return Work(
            kernels=lambda: diffuse(images, phi, key, index, flips, DTYPES[dtype]),
            plain=plain,
            reads=[images, phi, key, index, *([flips] if flip else [])],
            same_numbers=lambda: reference.diffuse(images, phi, key, index, flips, torch.float64),
        )

    name, run = f"{_shape(network, n, channels, size)}{' flip' if flip else ''}", channels * size[0] * size[1]
    # Wide are accesses of z; of the images, a byte an element, a thread has 4 or 8 bytes.
    return _case("diffuse", network, name, n, make, run, dtype, narrow=("images_ptr",))


def state_case(
    op: str, network: str, n: int, channels: int, size: Size, dtype: str, parts: int, channels_last: bool = True
) -> Case:
    """op: ddim_step; ddim_step_weighted_loss, of which nothing need be read again, one pass over the tensors gives both; or
    ddim_step_weighted_loss_and_grad, which returns the loss and its gradient at once."""

    def make(n: int, device: str) -> Work:
        def image(channels: int, dtype: str) -> Tensor:
            return _image(n, channels, size, dtype, device, channels_last)

        def column(*shape: int) -> Tensor:
            return torch.full((STEPS, *shape), 0.5, device=device)

        index, output = torch.zeros(n, dtype=torch.int64, device=device), image(parts * channels, dtype)
        if op == "ddim_step":
            z = image(channels, dtype)
            both, inputs = [z.requires_grad_(), output.requires_grad_()], (z, output, column(), column(parts), index)
            return Work(
                partial(ddim_step, *inputs), partial(reference.ddim_step, *inputs), [*both, index], [], both, [index]
            )
        tensors = [output, image(channels, "fp32"), *(image(parts * channels, dtype) for _ in range(2))]
        inputs = *tensors, column(), *(column(parts) for _ in range(3)), column(), index
        ours, plain = ddim_step_weighted_loss, reference.ddim_step_weighted_loss
        if op.endswith("_and_grad"):
            ours = partial(ddim_step_weighted_loss_and_grad, grad_scale=1.0)
            plain = partial(reference.ddim_step_weighted_loss_and_grad, grad_scale=1.0)
        differentiated = [] if op.endswith("_and_grad") else [output.requires_grad_()]
        return Work(partial(ours, *inputs), partial(plain, *inputs), [*tensors, index], [], differentiated)

    run = channels if channels_last and parts > 1 else channels * size[0] * size[1]
    name = f"{_shape(network, n, channels, size)} P={parts} {'NHWC' if channels_last else 'NCHW'}"
    return _case(op, network, name, n, make, run, dtype, narrow=("a_ptr", "b_ptr") if op == "ddim_step" else ())


def group_norm_case(
    network: str, n: int, channels: int, size: Size, dtype: str, kind: str, groups: int | None = None
) -> Case:
    """kind: film+silu, silu or plain."""
    film, silu, groups = kind == "film+silu", kind != "plain", groups or gcd(channels, GROUPS)

    def make(n: int, device: str) -> Work:
        x = _image(n, channels, size, dtype, device).requires_grad_()
        weight, bias = (torch.zeros(channels, device=device, requires_grad=True) for _ in range(2))
        both = torch.zeros(n, 2 * channels, dtype=DTYPES[dtype], device=device)  # of one linear layer
        scale, shift = (half.requires_grad_() for half in both.chunk(2, dim=1)) if film else (None, None)
        inputs = [x, weight, bias, *([scale, shift] if film else [])]
        arguments, options = (x, groups, weight, bias, EPS), {"scale": scale, "shift": shift, "silu": silu}
        ours, plain = (partial(norm, *arguments, **options) for norm in (group_norm, reference.group_norm))
        return Work(ours, plain, inputs, [], inputs, inputs if silu else [x, weight, *([scale] if film else [])])

    return _case("group_norm", network, f"{_shape(network, n, channels, size)} {kind}", n, make, channels, dtype)


def attention_case(
    network: str, n: int, positions: int, heads: int, head_dim: int, dtype: str, packed: bool = True
) -> Case:
    def make(n: int, device: str) -> Work:
        shape = (n, positions, *((3,) if packed else ()), heads, head_dim)
        options = {"dtype": DTYPES[dtype], "device": device, "requires_grad": True}
        inputs = [torch.zeros(shape, **options) for _ in range(1 if packed else 3)]
        ours, plain = (attention_packed, reference.attention_packed) if packed else (attention, reference.attention)
        return Work(partial(ours, *inputs), partial(plain, *inputs), inputs, [], inputs, inputs)

    name, cores = (
        f"{n}x{positions}x{heads}x{head_dim}{' packed' if packed else ''}",
        dtype != "fp32" and positions >= 64,
    )
    return _case("attention", network, name, n, make, head_dim, dtype, tensor_cores=cores)


def attention_block_case(network: str, n: int, channels: int, size: Size, dtype: str, heads: int) -> Case:
    def make(n: int, device: str) -> Work:
        c = channels
        shapes = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,))
        parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        x = _image(n, c, size, dtype, device).requires_grad_()
        tensors, inputs = [x, *parameters], (x, gcd(c, GROUPS), *parameters, heads)
        ours, plain = (partial(f, *inputs) for f in (group_norm_attention, reference.group_norm_attention))
        return Work(ours, plain, tensors, [], tensors, tensors)

    name, cores = f"{_shape(network, n, channels, size)} heads={heads}", dtype != "fp32" and size[0] * size[1] >= 64
    return _case("group_norm_attention", network, name, n, make, channels, dtype, tensor_cores=cores)


def adam_ema_case(name: str, sizes: tuple[int, ...], dtype: str) -> Case:
    """One step on parameters of these sizes, with gradients of that dtype; there are no samples."""

    def make(n: int, device: str) -> Work:
        states = [[torch.zeros(size, device=device) for size in sizes] for _ in range(4)]
        gradients = [torch.zeros(size, dtype=DTYPES[dtype], device=device) for size in sizes]
        scalars = torch.tensor([1e-4, 1.0, 1.0, 1e-4, 0.0], device="cpu" if device == "meta" else device)
        settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        optimizer = None if device == "meta" else AdamEma(*states, **settings)
        return Work(
            kernels=lambda: optimizer.step(gradients, scalars),
            plain=lambda: reference.adam_ema(*states, gradients, scalars, **settings),
            reads=[*chain(*states), *gradients],
            writes=[*chain(*states)],
        )

    # A thread has 4 elements of everything; where not all sizes are multiples of 4, the kernel decides for each.
    width = (128 if dtype == "fp32" else 64) if all(size % 4 == 0 for size in sizes) else 0
    return Case("adam_ema", "", f"{name}, {dtype} gradients", 1, make, width)
