"""`ddim_step_weighted_loss`: the loss of one student step that spans two DDIM steps of the teacher, with its gradient.

    target = a z + sum_p b_p t_p + sum_p d_p m_p          loss = weight mean (sum_p c_p o_p - target)^2

o, t, m      [N, P*C, ...] bf16, fp16 or fp32: the student's output, the teacher's, and the teacher's in the middle;
             P = 1, or 2 for networks that predict x and eps (x first)
z            [N, C, ...] bf16, fp16 or fp32; all four channels-last or all contiguous, or they are copied so
a, weight    [R];  b, d, c [R, P]: the columns of a step table, of which `index` (int64 [N]) gives each sample its row;
             without an index, R = N and row n is sample n's. A row that is not there makes its sample NaN
huber        h; above 0, an element's weighted square s counts as its pseudo-Huber form, 2 h (sqrt(s + h^2) - h)
loss         [N] float32 (float64 where one of o, t, m, z is), a mean over C, H, W

Computed in float32. Each tensor is read once, and the gradient with respect to o is written in the same pass if it is
wanted; what needs another gradient runs in PyTorch. Sums in two stages, without atomics: the same bits on every run.
Other dtypes run in PyTorch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdfast_kernels.ops.columns import coefficient, element, part_of
from pdfast_kernels.ops.ddim_step_weighted_loss import reference
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Blocks, Table
from pdfast_kernels.runtime.dispatch import (
    as_given,
    check_device,
    check_floating,
    check_shape,
    compute_dtype,
    triton_runs,
    unsupported_dtype,
)
from pdfast_kernels.runtime.index import check_index, in_range
from pdfast_kernels.runtime.launch import arch_of, cdiv, launch
from pdfast_kernels.runtime.layout import in_one_layout, run_length
from pdfast_kernels.runtime.namespace import in_namespace
from pdfast_kernels.runtime.triton import jit, tl

OP = "ddim_step_weighted_loss"
_Images = tuple[Tensor, Tensor, Tensor, Tensor]
_Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# By the elements of a sample: 16 bytes or more a thread and load.
TABLE = Table(OP, {ANY: (Blocks((1 << 14) - 1, 1024, 4), Blocks(UNBOUNDED, 2048, 8))})


@jit
def _forward(
    output_ptr,  # [N, P * M]
    z_ptr,  # [N, M]
    teacher_ptr,  # [N, P * M]
    teacher_mid_ptr,  # [N, P * M]
    target_z_ptr,  # [R]
    target_output_ptr,  # [R, P]
    target_output_mid_ptr,  # [R, P]
    output_coefficient_ptr,  # [R, P]
    weight_ptr,  # [R]
    index_ptr,  # [N]
    partial_ptr,  # [N, blocks]: sums of the loss
    grad_ptr,  # [N, P * M], or None
    grad_scale,
    M,
    R,
    RUN: tl.constexpr,
    P: tl.constexpr,
    INDEXED: tl.constexpr,
    HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, e, inside, row, there = element(index_ptr, M, R, INDEXED, BLOCK)
    error = -coefficient(target_z_ptr + row, there) * tl.load(z_ptr + n * M + e, mask=inside, other=0.0).to(tl.float32)
    for p in tl.static_range(P):
        place = n * M * P + part_of(e, p, RUN, P)
        output = tl.load(output_ptr + place, mask=inside, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + place, mask=inside, other=0.0).to(tl.float32)
        teacher_mid = tl.load(teacher_mid_ptr + place, mask=inside, other=0.0).to(tl.float32)
        error += coefficient(output_coefficient_ptr + row * P + p, there) * output
        error -= coefficient(target_output_ptr + row * P + p, there) * teacher
        error -= coefficient(target_output_mid_ptr + row * P + p, there) * teacher_mid
    weight = coefficient(weight_ptr + row, there)
    if HUBER == 0:
        tl.store(partial_ptr + tl.program_id(0), weight / M * tl.sum(error * error, axis=0))
    else:
        squared = weight * error * error
        root = tl.sqrt(squared + HUBER * HUBER)
        tl.store(partial_ptr + tl.program_id(0), 2.0 * HUBER / M * tl.sum(squared / (root + HUBER), axis=0))
        error *= HUBER / root
    if grad_ptr is not None:
        grad = 2.0 * grad_scale * weight * error
        for p in tl.static_range(P):
            place = n * M * P + part_of(e, p, RUN, P)
            grad_p = coefficient(output_coefficient_ptr + row * P + p, there) * grad
            tl.store(grad_ptr + place, grad_p.to(grad_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    grad_loss_ptr,  # [N]
    saved_ptr,  # [N, M]
    grad_ptr,  # [N, M]
    scale,
    M,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    saved = tl.load(saved_ptr + n * M + e, mask=e < M).to(tl.float32)
    grad = tl.load(grad_loss_ptr + n) * scale * saved
    tl.store(grad_ptr + n * M + e, grad.to(grad_ptr.dtype.element_ty), mask=e < M)


def _run(tensors: Sequence[Any], huber: float, grad_scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the losses, and grad_scale d(sum of M losses)/d output, M = C H W: empty for None. tensors: the arguments, in
    order."""
    output, z, teacher, teacher_mid, target_z, target_output, target_output_mid, coefficients, weight, index = tensors
    run, reason = run_length(z, output, teacher, teacher_mid)
    if reason:  # asked again: what was traced may come with other strides
        raise ValueError(f"{OP}: {reason}")
    parts, elements = coefficients.shape[1], z.numel() // max(len(z), 1)
    _, block, warps = TABLE.row(arch_of(z.device), elements)
    blocks = cdiv(elements, block)
    partial = torch.empty((len(z), blocks), dtype=torch.float32, device=z.device)
    grad = None if grad_scale is None else torch.empty_like(output)
    launch(
        _forward,
        (len(z) * blocks,),
        num_warps=warps,
        output_ptr=output,
        z_ptr=z,
        teacher_ptr=teacher,
        teacher_mid_ptr=teacher_mid,
        target_z_ptr=target_z,
        target_output_ptr=target_output,
        target_output_mid_ptr=target_output_mid,
        output_coefficient_ptr=coefficients,
        weight_ptr=weight,
        index_ptr=index,
        partial_ptr=partial,
        grad_ptr=grad,
        grad_scale=0.0 if grad_scale is None else grad_scale,
        M=elements,
        R=len(weight),
        RUN=run if parts > 1 else 1,
        P=parts,
        INDEXED=index is not None,
        HUBER=huber,
        BLOCK=block,
    )
    loss = partial.view(-1) if blocks == 1 else partial.sum(1)
    return loss, output.new_empty(0) if grad is None else grad


_SCHEMA = """(Tensor output, Tensor z, Tensor teacher_output, Tensor teacher_output_mid, Tensor target_z, Tensor target_output,
Tensor target_output_mid, Tensor output_coefficient, Tensor weight, Tensor? index, float huber, {}) -> (Tensor, Tensor)"""


@torch.library.custom_op(
    in_namespace("ddim_step_weighted_loss"), mutates_args=(), schema=_SCHEMA.format("bool differentiable")
)
def _loss(*given):
    """Return the losses, and d(M loss)/d output: divided by M = C H W, little would be left of it in fp16."""
    *tensors, huber, differentiable = given
    return _run(tensors, huber, 1.0 if differentiable else None)


@_loss.register_fake
def _(output, z, t, m, a, b, d, c, weight, index, huber, differentiable):
    saved = torch.empty_like(output) if differentiable else output.new_empty(0)
    return z.new_empty(z.shape[0], dtype=torch.float32), saved


@torch.library.custom_op(in_namespace("ddim_step_weighted_loss_backward"), mutates_args=())
def _loss_backward(grad_loss: Tensor, saved: Tensor, mean_of: int) -> Tensor:
    grad = torch.empty_like(saved)
    elements = saved.numel() // max(len(saved), 1)
    _, block, warps = TABLE.row(arch_of(saved.device), elements)
    launch(
        _backward,
        (len(saved) * cdiv(elements, block),),
        num_warps=warps,
        grad_loss_ptr=grad_loss.contiguous(),
        saved_ptr=saved,
        grad_ptr=grad,
        scale=1 / max(mean_of, 1),
        M=elements,
        BLOCK=block,
    )
    return grad


@_loss_backward.register_fake
def _(grad_loss, saved, mean_of):
    return torch.empty_like(saved)


def _setup_context(ctx, inputs, output):
    _, saved = output
    ctx.mean_of = inputs[1][:1].numel()
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(saved)


def _autograd(ctx, grad_loss, _):
    grad = None if grad_loss is None else _loss_backward(grad_loss, *ctx.saved_tensors, ctx.mean_of)
    return grad, *(None,) * 11


_loss.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op(
    in_namespace("ddim_step_weighted_loss_and_grad"), mutates_args=(), schema=_SCHEMA.format("float grad_scale")
)
def _loss_and_grad(*given):
    *tensors, huber, grad_scale = given
    return _run(tensors, huber, grad_scale / max(tensors[1][:1].numel(), 1))


@_loss_and_grad.register_fake
def _(output, z, t, m, a, b, d, c, weight, index, huber, grad_scale):
    return z.new_empty(z.shape[0], dtype=torch.float32), torch.empty_like(output)


def ddim_step_weighted_loss(
    output: Tensor,
    z: Tensor,
    teacher_output: Tensor,
    teacher_output_mid: Tensor,
    target_z: Tensor,
    target_output: Tensor,
    target_output_mid: Tensor,
    output_coefficient: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    huber: float = 0.0,
) -> Tensor:
    """weight mean (sum_p c_p o_p - target)^2, target = a z + sum_p b_p t_p + sum_p d_p m_p: the losses, [N].

    output, teacher_output: [N, P*C, ...], at (z, phi); teacher_output_mid: at (z_mid, phi_mid). z: [N, C, ...].
    target_z, weight: float [R]; target_output, target_output_mid, output_coefficient: [R, P]; index: int64 [N], the row
    of each sample, or None where R = N. huber: above 0, the pseudo-Huber form of the weighted squares, for outliers to count
    less. Differentiable with respect to output; see the module for layouts and dtypes.
    ValueError where a shape, dtype, device or index does not fit, and for a huber that is negative or not finite.
    """
    tensors = (output, z, teacher_output, teacher_output_mid)
    columns = (target_z, target_output, target_output_mid, output_coefficient, weight)
    index, columns = _checked(OP, tensors, columns, index, huber)
    if triton_runs(OP, z.device, _unsupported(*tensors, *columns)):
        differentiable = torch.is_grad_enabled() and output.requires_grad
        return _loss(*_in_one_layout(*tensors), *_dense(index, *columns), huber, differentiable)[0]
    with as_given(z.device):
        return reference.ddim_step_weighted_loss(*tensors, *columns, index, huber)


@torch.no_grad()
def ddim_step_weighted_loss_and_grad(
    output: Tensor,
    z: Tensor,
    teacher_output: Tensor,
    teacher_output_mid: Tensor,
    target_z: Tensor,
    target_output: Tensor,
    target_output_mid: Tensor,
    output_coefficient: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    *,
    grad_scale: float,
    huber: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the losses [N], and grad_scale d(sum of the losses)/d output, like output; neither is differentiable.

    For `torch.autograd.backward(output, grad)`: nothing of the loss is left for the backward to do. The arguments are
    those of `ddim_step_weighted_loss`.
    """
    tensors = (output, z, teacher_output, teacher_output_mid)
    columns = (target_z, target_output, target_output_mid, output_coefficient, weight)
    index, columns = _checked(f"{OP}_and_grad", tensors, columns, index, huber)
    if triton_runs(f"{OP}_and_grad", z.device, _unsupported(*tensors)):
        return _loss_and_grad(*_in_one_layout(*tensors), *_dense(index, *columns), huber, grad_scale)
    with as_given(z.device):
        return reference.ddim_step_weighted_loss_and_grad(*tensors, *columns, index, grad_scale=grad_scale, huber=huber)


def _checked(
    op: str, tensors: _Images, columns: _Columns, index: Tensor | None, huber: float
) -> tuple[Tensor | None, _Columns]:
    """Return the index, and the columns in the dtype that is computed in. ValueError where something does not fit."""
    _check(op, tensors, columns, index)
    if not 0 <= huber < math.inf:
        raise ValueError(f"{op}: huber is {huber}, expected a number from 0, the squared error")
    if index is not None:
        index = in_range(op, "index", index, 0, len(columns[0]))
    inside = compute_dtype(*tensors)
    a, b, d, c, weight = (column.to(inside) for column in columns)
    return index, (a, b, d, c, weight)


def _in_one_layout(output: Tensor, z: Tensor, teacher_output: Tensor, teacher_output_mid: Tensor) -> _Images:
    z, output, teacher_output, teacher_output_mid = in_one_layout(z, output, teacher_output, teacher_output_mid)
    return output, z, teacher_output, teacher_output_mid


def _dense(index: Tensor | None, *columns: Tensor) -> list[Tensor | None]:
    """Return the columns, then the index."""
    return [*(column.contiguous() for column in columns), None if index is None else index.contiguous()]


def _unsupported(output: Tensor, z: Tensor, teacher_output: Tensor, teacher_output_mid: Tensor, *columns) -> str | None:
    outputs = {"output": output, "teacher_output": teacher_output, "teacher_output_mid": teacher_output_mid}
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, teacher_output, teacher_output_mid, *columns)):
        return "it has the gradient with respect to output alone"
    if len(z) and not z.numel():
        return "the mean of no elements is NaN"
    return unsupported_dtype(z=z, **outputs)


def _check(op: str, tensors: _Images, columns: _Columns, index: Tensor | None) -> None:
    output, z, teacher_output, teacher_output_mid = tensors
    target_z, target_output, target_output_mid, c, weight = columns
    if z.dim() < 2:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}, expected [N, C, ...]")
    if c.dim() != 2 or c.shape[1] not in (1, 2):
        raise ValueError(f"{op}: output_coefficient has shape {tuple(c.shape)}, expected [R, P] with P = 1 or 2")
    rows, parts = z.shape[0] if index is None else c.shape[0], c.shape[1]
    outputs = {"output": output, "teacher_output": teacher_output, "teacher_output_mid": teacher_output_mid}
    vectors = {"target_z": target_z, "weight": weight}
    matrices = {"target_output": target_output, "target_output_mid": target_output_mid, "output_coefficient": c}
    for named, shape in [
        (outputs, (z.shape[0], parts * z.shape[1], *z.shape[2:])),
        (vectors, (rows,)),
        (matrices, (rows, parts)),
    ]:
        for name, tensor in named.items():
            check_shape(op, name, tensor, shape)
    check_floating(op, z=z, **outputs, **vectors, **matrices)
    check_index(op, index, z.shape[0])
    check_device(op, z.device, **outputs, **vectors, **matrices, index=index)
