"""`ddim_step`: one DDIM step with the network's output.

    z' = a z + sum_p b_p o_p

z      [N, C, ...] bf16, fp16 or fp32; channels-last or contiguous
o      [N, P*C, ...] bf16, fp16 or fp32, laid out like z, or it is copied so; P = 1, or 2 for a network that predicts x and eps (x first)
a, b   [R], [R, P]: the coefficients of the R steps of a table, of which `index` (int64 [N]) gives each sample its row;
       without an index, R = N and row n is sample n's. A row that is not there makes its sample NaN
z'     like z

Computed in float32. Each element of z and o is read once and each of z' written once, forward. Where da or db is wanted (the
coefficients are the schedule's as a rule), and for other dtypes, it runs in PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from pdfast_kernels.ops.columns import coefficient, element, part_of
from pdfast_kernels.ops.ddim_step import reference
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Blocks, Table
from pdfast_kernels.runtime.dispatch import (
    as_given,
    check_device,
    check_floating,
    check_shape,
    triton_runs,
    unsupported_dtype,
)
from pdfast_kernels.runtime.index import check_index, in_range
from pdfast_kernels.runtime.launch import arch_of, cdiv, launch
from pdfast_kernels.runtime.layout import in_one_layout, is_channels_last, run_length, with_layout
from pdfast_kernels.runtime.namespace import in_namespace
from pdfast_kernels.runtime.triton import jit, tl

OP = "ddim_step"

# By the elements of a sample: 16 bytes or more a thread and load.
TABLE = Table(OP, {ANY: (Blocks((1 << 14) - 1, 1024, 4), Blocks(UNBOUNDED, 4096, 8))})


@jit
def _forward(
    z_ptr,  # [N, M]
    output_ptr,  # [N, P * M]
    a_ptr,  # [R]
    b_ptr,  # [R, P]
    index_ptr,  # [N]
    result_ptr,  # [N, M]
    M,
    R,
    RUN: tl.constexpr,
    P: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, e, inside, row, there = element(index_ptr, M, R, INDEXED, BLOCK)
    z = tl.load(z_ptr + n * M + e, mask=inside).to(tl.float32)
    result = coefficient(a_ptr + row, there) * z
    for p in tl.static_range(P):
        place = part_of(e, p, RUN, P)
        output = tl.load(output_ptr + n * M * P + place, mask=inside).to(tl.float32)
        result += coefficient(b_ptr + row * P + p, there) * output
    tl.store(result_ptr + n * M + e, result.to(result_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    grad_ptr,  # [N, M]
    a_ptr,  # [R]
    b_ptr,  # [R, P]
    index_ptr,  # [N]
    grad_z_ptr,  # [N, M]
    grad_output_ptr,  # [N, P * M]
    M,
    R,
    RUN: tl.constexpr,
    P: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, e, inside, row, there = element(index_ptr, M, R, INDEXED, BLOCK)
    grad = tl.load(grad_ptr + n * M + e, mask=inside).to(tl.float32)
    grad_z = coefficient(a_ptr + row, there) * grad
    tl.store(grad_z_ptr + n * M + e, grad_z.to(grad_z_ptr.dtype.element_ty), mask=inside)
    for p in tl.static_range(P):
        place = part_of(e, p, RUN, P)
        grad_output = coefficient(b_ptr + row * P + p, there) * grad
        tl.store(grad_output_ptr + n * M * P + place, grad_output.to(grad_output_ptr.dtype.element_ty), mask=inside)


def _launch(kernel, z: Tensor, b: Tensor, index: Tensor | None, run: int, **tensors: Any) -> None:
    rows, parts = b.shape
    elements = z.numel() // max(len(z), 1)
    _, block, warps = TABLE.row(arch_of(z.device), elements)
    launch(
        kernel,
        (len(z) * cdiv(elements, block),),
        num_warps=warps,
        **tensors,
        b_ptr=b,
        index_ptr=index,
        M=elements,
        R=rows,
        RUN=run if parts > 1 else 1,
        P=parts,
        INDEXED=index is not None,
        BLOCK=block,
    )


@torch.library.custom_op(in_namespace("ddim_step"), mutates_args=())
def _ddim_step(z: Tensor, output: Tensor, a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    run, reason = run_length(z, output)
    if reason:  # asked again: what was traced may come with other strides
        raise ValueError(f"{OP}: {reason}")
    result = torch.empty_like(z)
    _launch(_forward, z, b, index, run, z_ptr=z, output_ptr=output, a_ptr=a, result_ptr=result)
    return result


@_ddim_step.register_fake
def _(z, output, a, b, index):
    return torch.empty_like(z)


@torch.library.custom_op(in_namespace("ddim_step_backward"), mutates_args=())
def _ddim_step_backward(
    grad: Tensor, a: Tensor, b: Tensor, index: Tensor | None, output_dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, Tensor]:
    grad = with_layout(grad, channels_last)
    grad_z, grad_output = _empty_gradients(grad, b, output_dtype, channels_last)
    run, _ = run_length(grad_z, grad_output)
    _launch(_backward, grad, b, index, run, grad_ptr=grad, a_ptr=a, grad_z_ptr=grad_z, grad_output_ptr=grad_output)
    return grad_z, grad_output


@_ddim_step_backward.register_fake
def _(grad, a, b, index, output_dtype, channels_last):
    return _empty_gradients(grad, b, output_dtype, channels_last)


def _empty_gradients(grad: Tensor, b: Tensor, output_dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    n, c, *rest = grad.shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad_z = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    shape = (n, b.shape[1] * c, *rest)
    return grad_z, torch.empty(shape, dtype=output_dtype, device=grad.device, memory_format=memory_format)


def _setup_context(ctx, inputs, output):
    z, network_output, a, b, index = inputs
    ctx.save_for_backward(a, b, index)
    ctx.output_dtype = network_output.dtype
    ctx.channels_last = is_channels_last(z) and is_channels_last(network_output)


def _autograd(ctx, grad):
    a, b, index = ctx.saved_tensors
    grad_z, grad_output = _ddim_step_backward(grad, a, b, index, ctx.output_dtype, ctx.channels_last)
    return grad_z, grad_output, None, None, None


_ddim_step.register_autograd(_autograd, setup_context=_setup_context)


def ddim_step(
    z: Tensor, output: Tensor, z_coefficient: Tensor, output_coefficient: Tensor, index: Tensor | None = None
) -> Tensor:
    """z' = a z + sum_p b_p o_p: one DDIM step with the network's output at z.

    z: [N, C, ...]. output: [N, P*C, ...]. z_coefficient, output_coefficient: float [R] and [R, P]; index: int64 [N], the
    row of each sample, or None where R = N. Returns z' like z; see the module for layouts, dtypes and gradients.
    ValueError where a shape, dtype, device or index does not fit.
    """
    a, b = z_coefficient, output_coefficient
    _check(z, output, a, b, index)
    if index is not None:
        index = in_range(OP, "index", index, 0, len(a))
    if triton_runs(OP, z.device, _unsupported(z, output, a, b)):
        index = None if index is None else index.contiguous()
        return _ddim_step(*in_one_layout(z, output), a.float().contiguous(), b.float().contiguous(), index)
    with as_given(z.device):
        return reference.ddim_step(z, output, a, b, index)


def _unsupported(z: Tensor, output: Tensor, a: Tensor, b: Tensor) -> str | None:
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return "it has no gradient with respect to the coefficients"
    return unsupported_dtype(z=z, output=output)


def _check(z: Tensor, output: Tensor, a: Tensor, b: Tensor, index: Tensor | None) -> None:
    if z.dim() < 2:
        raise ValueError(f"{OP}: z has shape {tuple(z.shape)}, expected [N, C, ...]")
    if b.dim() != 2 or b.shape[1] not in (1, 2):
        raise ValueError(f"{OP}: output_coefficient has shape {tuple(b.shape)}, expected [R, P] with P = 1 or 2")
    rows = a.shape[0] if index is not None else z.shape[0]
    check_shape(OP, "z_coefficient", a, (rows,))
    check_shape(OP, "output_coefficient", b, (rows, b.shape[1]))
    check_shape(OP, "output", output, (z.shape[0], b.shape[1] * z.shape[1], *z.shape[2:]))
    check_floating(OP, z=z, output=output, z_coefficient=a, output_coefficient=b)
    check_index(OP, index, z.shape[0])
    check_device(OP, z.device, output=output, z_coefficient=a, output_coefficient=b, index=index)
