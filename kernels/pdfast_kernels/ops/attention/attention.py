"""`attention`, `attention_packed`: self-attention over the positions of an image, without mask or dropout.

    out = softmax(scale q k^T) v          softmax over the keys, for each sample, head and query

q, k, v    [N, L, heads, D] bf16, fp16 or fp32, one dtype; any strides, the last one 1. `attention_packed` takes them as
           one tensor [N, L, 3, heads, D], a view of a linear layer's output, and returns one gradient laid out like it
out        [N, L, heads, D], contiguous: what the next linear layer reads
D          a multiple of 8 up to 256, in fp32 up to 128; what is no power of two is padded on chip. Any L
scale      positive; 1/sqrt(D) unless said

Softmax and sums in float32; fp32 tensors are multiplied in fp32, not in TF32. Where all keys of a head fit on chip each
tensor is read once (`forward_resident`; `backward_tile` and `backward_resident`), else keys or queries stream past
(`forward_stream`; `row_products` and `backward_stream`). Which, L, D and the dtype decide, never N. Saved for the backward:
the inputs, out, and lse, float32 [N, heads, L], the base-2 logarithm of the softmax's denominator. No atomics: the same
bits on every run, and for a sample in any batch. Loads are of 16 bytes where all strides are multiples of 8 elements.
Other dtypes, layouts and sizes run in PyTorch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdfast_kernels.ops.attention import reference
from pdfast_kernels.ops.attention.attention_kernels import (
    backward_resident,
    backward_stream,
    backward_tile,
    forward_resident,
    forward_stream,
    row_products,
)
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Table
from pdfast_kernels.runtime.dispatch import as_given, check_device, check_floating, triton_runs, unsupported_dtype
from pdfast_kernels.runtime.launch import arch_of, cdiv, launch, next_power_of_2
from pdfast_kernels.runtime.namespace import in_namespace

MOST_DIM, MOST_DIM_FP32 = 256, 128  # above, the kernels would spill registers
MOST_ROW_STRIDE = 1 << 22  # times the rows of a block, within 32 bits
MANY_PAIRS = 256  # samples times heads that fill a GPU by themselves
DELTA_TILE = 4096  # elements
APART_COLUMNS = 256  # from which on dk and dv are left to two programs


class Config(NamedTuple):
    """A kernel and how it is launched, for at most so many keys and columns."""

    keys: float
    columns: int
    kernel: Callable
    block: int  # rows that a program owns: queries forward, keys backward
    step: int  # rows of the others that it takes at a time
    num_warps: int
    num_stages: int
    queries: int = 0  # that a program of `backward_stream` owns which computes dq; as many as keys unless said

    def fitted(self, length: int) -> "Config":
        """It, with no more rows than there are."""
        rows = max(next_power_of_2(length), 16)
        warps = max(self.num_warps * min(self.block, rows) // self.block, 1)
        block, step, queries = (min(size, rows) for size in (self.block, self.step, self.queries or self.block))
        return self._replace(block=block, step=step, queries=queries, num_warps=warps)


# 90, 100: 227 KB of shared memory, and matrix instructions that read it, of 64 and of 128 rows; 80: 163 KB; the others
# have 99 KB. Chosen by what the compiler reports (nothing spills), not by time yet.
_FORWARD: dict[int, tuple[Config, ...]] = {
    90: (
        Config(256, 64, forward_resident, 64, 256, 4, 2),
        Config(128, 128, forward_resident, 64, 128, 4, 2),
        Config(64, 256, forward_resident, 64, 64, 8, 2),
        Config(UNBOUNDED, 128, forward_stream, 128, 64, 8, 3),
        Config(UNBOUNDED, 256, forward_stream, 128, 64, 8, 2),
    ),
    ANY: (
        Config(128, 64, forward_resident, 64, 128, 4, 2),
        Config(64, 256, forward_resident, 64, 64, 8, 2),
        Config(UNBOUNDED, 64, forward_stream, 128, 64, 4, 3),
        Config(UNBOUNDED, 128, forward_stream, 128, 32, 8, 2),
        Config(UNBOUNDED, 256, forward_stream, 64, 16, 4, 2),
    ),
}
_BACKWARD: dict[int, tuple[Config, ...]] = {
    90: (
        Config(64, 128, backward_tile, 64, 64, 4, 1),
        Config(64, 256, backward_tile, 64, 64, 8, 1),
        Config(128, 128, backward_tile, 128, 128, 8, 1),
        Config(UNBOUNDED, 64, backward_stream, 64, 64, 4, 3, queries=128),
        Config(UNBOUNDED, 128, backward_stream, 64, 32, 4, 3),
        Config(UNBOUNDED, 256, backward_stream, 128, 32, 8, 3),
    ),
    ANY: (
        Config(64, 128, backward_tile, 64, 64, 4, 1),
        Config(32, 256, backward_tile, 32, 32, 4, 1),
        Config(UNBOUNDED, 32, backward_stream, 128, 64, 8, 2),
        Config(UNBOUNDED, 64, backward_stream, 64, 64, 4, 2),
        Config(UNBOUNDED, 128, backward_stream, 64, 32, 4, 2),
        Config(UNBOUNDED, 256, backward_stream, 64, 16, 4, 2),
    ),
}
_FORWARD[80], _BACKWARD[80] = _FORWARD[ANY], (Config(64, 256, backward_tile, 64, 64, 8, 1), *_BACKWARD[ANY])
_FORWARD[100] = (
    *_FORWARD[90][:-2],
    Config(UNBOUNDED, 64, forward_stream, 128, 64, 4, 3),
    Config(UNBOUNDED, 128, forward_stream, 128, 64, 8, 3),
    Config(UNBOUNDED, 256, forward_stream, 128, 32, 8, 2),
)
_BACKWARD[100] = (
    *_BACKWARD[90][:-3],
    Config(256, 64, backward_resident, 256, 32, 8, 2),
    Config(UNBOUNDED, 64, backward_stream, 128, 128, 8, 2),
    Config(UNBOUNDED, 128, backward_stream, 128, 64, 8, 2),
    Config(UNBOUNDED, 256, backward_stream, 128, 32, 8, 2),
)
_FORWARD[103], _BACKWARD[103] = _FORWARD[100], _BACKWARD[100]
FORWARD, BACKWARD = Table("attention forward", _FORWARD), Table("attention backward", _BACKWARD)
FORWARD_FP32 = Table(
    "attention forward fp32",
    {
        ANY: (
            Config(32, 64, forward_resident, 32, 32, 4, 1),
            Config(UNBOUNDED, 64, forward_stream, 32, 16, 4, 1),
            Config(UNBOUNDED, 128, forward_stream, 32, 16, 8, 1),
        )
    },
)
BACKWARD_FP32 = Table(
    "attention backward fp32",
    {
        ANY: (
            Config(32, 64, backward_tile, 32, 32, 4, 1),
            Config(16, 128, backward_tile, 16, 16, 4, 1),
            Config(UNBOUNDED, 32, backward_stream, 32, 16, 8, 1),
            Config(UNBOUNDED, 64, backward_stream, 32, 16, 4, 1),
            Config(UNBOUNDED, 128, backward_stream, 8, 16, 8, 1),
        )
    },
)


def _config(backward: bool, q: Tensor) -> Config:
    if q.dtype == torch.float32:
        table = BACKWARD_FP32 if backward else FORWARD_FP32
    else:
        table = BACKWARD if backward else FORWARD
    return table.row(arch_of(q.device), q.shape[1], _columns(q)).fitted(q.shape[1])


def _columns(q: Tensor) -> int:
    return max(next_power_of_2(q.shape[3]), 16)


def _arguments(scale: float, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor | None = None) -> dict:
    """Return what all kernels but `row_products` take, of the tensors: strides in units of 8 elements where that is
    possible."""
    strides: dict[str, int] = {}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("d", gradient)):
        if tensor is not None:
            n, length, heads, _ = (
                stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            )
            strides |= {f"{name}_n": n, f"{name}_l": length, f"{name}_h": heads}
    unit = 8 if all(stride % 8 == 0 for stride in strides.values()) else 1
    arguments: dict[str, Any] = {name: stride // unit for name, stride in strides.items()}
    arguments |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "L": q.shape[1], "heads": q.shape[2], "D": q.shape[3]}
    return arguments | {"SCALE2": scale * math.log2(math.e), "UNIT": unit, "BLOCK_D": _columns(q)}


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse."""
    n, length, heads, _ = q.shape
    out, lse = _empty_outputs(q)
    config = _config(False, q)
    blocks = cdiv(length, config.block)
    constants = {"BLOCK": config.block, "STEP": config.step}
    constants["EVEN"] = length % config.block == 0 and length % config.step == 0
    if config.kernel is forward_resident:
        constants["SHARE"] = blocks if n * heads >= MANY_PAIRS else 1
        blocks = cdiv(blocks, constants["SHARE"])
    launch(
        config.kernel,
        (n * heads * blocks,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        out_ptr=out,
        lse_ptr=lse,
        **_arguments(scale, q, k, v),
        **constants,
    )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, gradients: tuple[Tensor, ...]
) -> None:
    """Write the gradients of q, k and v, which have the same strides."""
    n, length, heads, dim = q.shape
    grad = grad.contiguous()
    config = _config(True, q)
    arguments = _arguments(scale, q, k, v, gradients[0])
    arguments |= {"grad_ptr": grad, "lse_ptr": lse, "SCALE": scale, "BLOCK": config.block}
    arguments |= dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), gradients, strict=True))
    grid: tuple[int, ...] = (n * heads,)
    if config.kernel is not backward_tile:
        arguments["STEP"] = config.step
    if config.kernel is backward_stream:
        block = min(max(DELTA_TILE // _columns(q), 1), config.block)
        delta = torch.empty_like(lse)
        constants = {"L": length, "heads": heads, "D": dim, "BLOCK": block, "BLOCK_D": _columns(q)}
        delta_grid = (n * heads * cdiv(length, block),)
        launch(row_products, delta_grid, num_warps=4, grad_ptr=grad, out_ptr=out, delta_ptr=delta, **constants)
        apart = _columns(q) >= APART_COLUMNS
        grid = (n * heads * (cdiv(length, config.block) * (2 if apart else 1) + cdiv(length, config.queries)),)
        arguments |= {"delta_ptr": delta, "APART": apart, "QUERIES": config.queries}
    launch(
        config.kernel,
        grid,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        EVEN=all(length % rows == 0 for rows in (config.block, config.step, config.queries)),
        **arguments,
    )


_attention = torch.library.custom_op(in_namespace("attention"), forward, mutates_args=())


@_attention.register_fake
def _(q, k, v, scale):
    return _empty_outputs(q)


@torch.library.custom_op(in_namespace("attention_backward"), mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(q)
    backward(grad, q, k, v, out, lse, scale, gradients)
    return gradients


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, scale):
    return _empty_gradients(q)


@torch.library.custom_op(in_namespace("attention_packed"), mutates_args=())
def _attention_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return forward(q, k, v, scale)


@_attention_packed.register_fake
def _(qkv, scale):
    return _empty_outputs(qkv[:, :, 0])


@torch.library.custom_op(in_namespace("attention_packed_backward"), mutates_args=())
def _attention_packed_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    gradient = empty_gradient(qkv)
    q, k, v = qkv.unbind(2)
    backward(grad, q, k, v, out, lse, scale, gradient.unbind(2))
    return gradient


@_attention_packed_backward.register_fake
def _(grad, qkv, out, lse, scale):
    return empty_gradient(qkv)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    n, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(n, heads, length, dtype=torch.float32, device=q.device)


def _empty_gradients(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    return dq, dk, dv


def empty_gradient(qkv: Tensor) -> Tensor:
    """Laid out like qkv where that is dense, so that its view as the linear layer's output is contiguous again."""
    gradient = torch.empty_like(qkv)
    return gradient if gradient.stride(-1) == 1 else torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad, _lse):
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _autograd_packed(ctx, grad, _lse):
    return _attention_packed_backward(grad, *ctx.saved_tensors, ctx.scale), None


_attention.register_autograd(_autograd, setup_context=_setup_context)
_attention_packed.register_autograd(_autograd_packed, setup_context=_setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the positions of [N, L, heads, D]: [N, L, heads, D], contiguous.

    scale: 1/sqrt(D) unless said. See the module for layouts and dtypes. ValueError where a shape, dtype or device does
    not fit.
    """
    if q.dim() != 4:
        raise ValueError(f"attention: q has shape {tuple(q.shape)}, expected [N, L, heads, D]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"attention: {name} has shape {tuple(tensor.shape)}, expected that of q, {tuple(q.shape)}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {tensor.dtype}, expected that of q, {q.dtype}")
    check_floating("attention", q=q)
    check_device("attention", q.device, k=k, v=v)
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    if q.numel() and triton_runs("attention", q.device, unsupported(scale, q=q, k=k, v=v)):
        return _attention(q, k, v, scale)[0]
    with as_given(q.device):
        return reference.attention(q, k, v, scale)


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` of q, k, v = the three parts of qkv [N, L, 3, heads, D]: [N, L, heads, D], contiguous.

    scale: 1/sqrt(D) unless said. See the module for layouts and dtypes. ValueError where a shape or dtype does not fit.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_packed: qkv has shape {tuple(qkv.shape)}, expected [N, L, 3, heads, D]")
    check_floating("attention_packed", qkv=qkv)
    scale = max(qkv.shape[4], 1) ** -0.5 if scale is None else scale
    if qkv.numel() and triton_runs("attention_packed", qkv.device, unsupported(scale, qkv=qkv)):
        return _attention_packed(qkv, scale)[0]
    with as_given(qkv.device):
        return reference.attention_packed(qkv, scale)


def unsupported(scale: float, **tensors: Tensor) -> str | None:
    """Return why the kernels cannot take tensors [N, L, ..., D], or None."""
    if reason := unsupported_dtype(**tensors):
        return reason
    if not scale > 0:
        return f"scale is {scale}, not positive"
    for name, tensor in tensors.items():
        if reason := unsupported_dim(tensor.shape[-1], tensor.dtype):
            return f"{name} {tuple(tensor.shape)} has {reason}"
        if tensor.stride(-1) != 1 or tensor.stride(1) > MOST_ROW_STRIDE:
            return f"{name} has strides {tuple(tensor.stride())}, not 1 for D and at most {MOST_ROW_STRIDE} for L"
    return None


def unsupported_dim(dim: int, dtype: torch.dtype) -> str | None:
    most = MOST_DIM_FP32 if dtype == torch.float32 else MOST_DIM
    return f"head_dim {dim}, not a multiple of 8 up to {most} ({dtype})" if dim > most or dim % 8 else None
