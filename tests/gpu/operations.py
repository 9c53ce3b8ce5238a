"""Every operation at a few shapes: its arguments, and which of them have gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import pdfast_kernels
from pdfast_kernels import reference
from tests.kernels.compare import channels_last


@dataclass(frozen=True)
class Operation:
    """`ours(*tensors)` and the same in plain PyTorch; the tensors are drawn in float32 and may be of any dtype."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    tensors: Callable[..., list[Tensor]]
    """Of a function draw(*shape)."""
    in_float32: bool = True
    """Whether its kernels take float32 at this shape."""


def group_norm(n: int, c: int, size: int, groups: int) -> Operation:
    def call(function, x, weight, bias, film):
        scale, shift = film.chunk(2, dim=1)
        return function(x, groups, weight, bias, 1e-6, scale=scale, shift=shift, silu=True)

    def tensors(draw):
        return [channels_last(draw(n, c, size, size)), draw(c), draw(c), draw(n, 2 * c)]

    return Operation(partial(call, pdfast_kernels.group_norm), partial(call, reference.group_norm), tensors)


def attention(n: int, length: int, heads: int, dim: int) -> Operation:
    def tensors(draw):
        return [draw(n, length, 3, heads, dim)]

    return Operation(pdfast_kernels.attention_packed, reference.attention_packed, tensors, in_float32=dim <= 128)


def group_norm_attention(n: int, c: int, size: int, groups: int, heads: int) -> Operation:
    def call(function, x, *parameters):
        return function(x, groups, *parameters, heads)

    def tensors(draw):
        weights = [draw(c), draw(c), draw(3 * c, c) / c**0.5, draw(3 * c), draw(c, c) / c**0.5, draw(c)]
        return [channels_last(draw(n, c, size, size)), *weights]

    return Operation(
        partial(call, pdfast_kernels.group_norm_attention), partial(call, reference.group_norm_attention), tensors
    )


def rows_of_a_table(z):
    """Five coefficients, equal bit for bit however they are compiled, and each sample's row."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (torch.arange(5, device=z.device, dtype=dtype) + 2) / 8, torch.arange(len(z), device=z.device) % 5


def ddim_step(n: int, c: int, size: int, parts: int) -> Operation:
    def call(function, z, output):
        rows, index = rows_of_a_table(z)
        return function(z, output, rows, rows[:, None].repeat(1, parts), index)

    def tensors(draw):
        return [channels_last(draw(n, c, size, size)), channels_last(draw(n, parts * c, size, size))]

    return Operation(partial(call, pdfast_kernels.ddim_step), partial(call, reference.ddim_step), tensors)


def loss(n: int, c: int, size: int, parts: int) -> Operation:
    def call(function, output, z, first, second):
        rows, index = rows_of_a_table(z)
        columns = rows[:, None].repeat(1, parts)
        fixed = z.detach(), first.detach(), second.detach()
        return function(output, *fixed, rows, columns, columns, columns, rows, index)

    def tensors(draw):
        return [channels_last(draw(n, k, size, size)) for k in (parts * c, c, parts * c, parts * c)]

    return Operation(
        partial(call, pdfast_kernels.ddim_step_weighted_loss), partial(call, reference.ddim_step_weighted_loss), tensors
    )


OPERATIONS = {
    "group_norm resident": group_norm(3, 256, 16, 32),
    "group_norm resident, 6 channels a group": group_norm(2, 192, 8, 32),
    "group_norm streamed": group_norm(2, 128, 64, 32),
    "group_norm streamed, odd": group_norm(2, 96, 45, 32),
    "attention 64 x 64": attention(3, 64, 4, 64),
    "attention 256 x 64": attention(3, 256, 4, 64),
    "attention 256 x 256": attention(2, 256, 1, 256),
    "attention 1024 x 80": attention(1, 1024, 2, 80),
    "attention 100 x 40": attention(2, 100, 2, 40),
    "attention of many pairs": attention(64, 64, 8, 64),
    "group_norm_attention": group_norm_attention(2, 256, 16, 32, 4),
    "ddim_step v": ddim_step(4, 3, 32, 1),
    "ddim_step both": ddim_step(4, 3, 32, 2),
    "loss v": loss(4, 3, 32, 1),
    "loss both": loss(4, 3, 32, 2),
    "loss of latents": loss(3, 4, 64, 1),
}
