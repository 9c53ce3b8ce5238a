"""`attention`, `attention_packed`: self-attention over the positions of an image, without mask or dropout.

    out = softmax(scale q k^T) v          softmax over the keys, for each sample, head and query

q, k, v    [N, L, heads, D] bf16, fp16 or fp32, one dtype; any strides, the last one 1. `attention_packed` takes them as
           one tensor [N, L, 3, heads, D], a view of a linear layer's output, and returns one gradient laid out like it
out        [N, L, heads, D], contiguous: what the next linear layer reads
D          a multiple of 8 up to 256, in fp32 up to 128; what is no power of two is padded on chip. Any L
scale      positive; 1/sqrt(D) unless said

Softmax and sums in float32; fp32 tensors are multiplied in fp32, not in TF32. Where all keys of a head fit on chip each
tensor is read once (`_forward_resident`; `_backward_tile` and `_backward_resident`), else keys or queries stream past
(`_forward_stream`; `_delta` and `_backward_stream`). Which, L, D and the dtype decide, never N. Saved for the backward:
the inputs, out, and lse, float32 [N, heads, L], the base-2 logarithm of the softmax's denominator. No atomics: the same
bits on every run, and for a sample in any batch. Loads are of 16 bytes where all strides are multiples of 8 elements.
Other dtypes, layouts and sizes run in PyTorch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pdfast_kernels import reference
from pdfast_kernels._triton import jit, tl
from pdfast_kernels.dispatch import check_device, check_floating, triton_runs, unsupported_dtype
from pdfast_kernels.launch import arch_of, cdiv, launch, next_power_of_2

MOST_DIM, MOST_DIM_FP32 = 256, 128  # above, the kernels would spill registers
MOST_ROW_STRIDE = 1 << 22  # times the rows of a block, within 32 bits
MANY_PAIRS = 256  # samples times heads that fill a GPU by themselves
DELTA_TILE = 4096  # elements
APART_COLUMNS = 256  # from which on dk and dv are left to two programs


@jit
def _pair(blocks, heads):
    """The block, sample and head of a program; int64, since they are multiplied by strides."""
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    return block.to(tl.int64), (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@jit
def _load_rows(ptr, stride, rows, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_L, BLOCK_D] from `ptr` on, zero from row `rows` and column D on; EVEN says that no row is."""
    row, d = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    place = ptr + row * stride + d
    if EVEN and D == BLOCK_D:
        return tl.load(place)
    if EVEN:
        return tl.load(place, mask=d < D, other=0.0)
    if D == BLOCK_D:
        return tl.load(place, mask=row < rows, other=0.0)
    return tl.load(place, mask=(row < rows) & (d < D), other=0.0)


@jit
def _store_rows(ptr, values, stride, rows, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    row, d = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + row * stride + d, values.to(ptr.dtype.element_ty), mask=(row < rows) & (d < D))


@jit
def _load_statistic(ptr, rows, BLOCK_L: tl.constexpr):
    """Zero from `rows` on, so that e^(s - lse) is finite there: such queries are all zero, and so are their scores."""
    row = tl.arange(0, BLOCK_L)
    return tl.load(ptr + row, mask=row < rows, other=0.0)


@jit
def _forward_resident(
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    out_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE2: tl.constexpr,  # scale log2(e)
    UNIT: tl.constexpr,  # of the strides, so that the compiler knows a divisor of theirs
    EVEN: tl.constexpr,  # L is a multiple of BLOCK and of STEP
    SHARE: tl.constexpr,  # query blocks of a program
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # at least L
    BLOCK_D: tl.constexpr,
):
    share, n, h = _pair(tl.cdiv(L, SHARE * BLOCK), heads)
    k = _load_rows(k_ptr + (n * k_n + h * k_h) * UNIT, k_l * UNIT, L, D, STEP, BLOCK_D, EVEN)
    v = _load_rows(v_ptr + (n * v_n + h * v_h) * UNIT, v_l * UNIT, L, D, STEP, BLOCK_D, EVEN)
    first = share * (SHARE * BLOCK)
    q_ptr += (n * q_n + h * q_h + first * q_l) * UNIT
    out_ptr += ((n * L + first) * heads + h) * D
    lse_ptr += (n * heads + h) * L + first
    row = tl.arange(0, BLOCK)
    for start in range(0, SHARE * BLOCK, BLOCK):
        rows = L - first - start
        q = _load_rows(q_ptr, q_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not EVEN:
            score = tl.where((tl.arange(0, STEP) < L)[None, :], score, float("-inf"))
        top = tl.max(score, axis=1) * SCALE2
        p = tl.exp2(score * SCALE2 - top[:, None])
        total = tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        _store_rows(out_ptr, out, heads * D, rows, D, BLOCK, BLOCK_D)
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row < rows)
        q_ptr += BLOCK * q_l * UNIT
        out_ptr += BLOCK * heads * D
        lse_ptr += BLOCK


@jit
def _forward_stream(
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    out_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, n, h = _pair(tl.cdiv(L, BLOCK), heads)
    first = block * BLOCK
    rows = L - first
    q = _load_rows(q_ptr + (n * q_n + h * q_h + first * q_l) * UNIT, q_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
    k_ptr += (n * k_n + h * k_h) * UNIT
    v_ptr += (n * v_n + h * v_h) * UNIT

    # Milakov & Gimelshein 2018: the running maximum (of scores in base 2), denominator and numerator.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        k = _load_rows(k_ptr, k_l * UNIT, L - start, D, STEP, BLOCK_D, EVEN)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not EVEN:
            score = tl.where((start + tl.arange(0, STEP) < L)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1) * SCALE2)
        p = tl.exp2(score * SCALE2 - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        out = out * shrink[:, None]
        v = _load_rows(v_ptr, v_l * UNIT, L - start, D, STEP, BLOCK_D, EVEN)
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        top = higher
        k_ptr += STEP * k_l * UNIT
        v_ptr += STEP * v_l * UNIT
    out = out / total[:, None]

    out_ptr += ((n * L + first) * heads + h) * D
    _store_rows(out_ptr, out, heads * D, rows, D, BLOCK, BLOCK_D)
    row = tl.arange(0, BLOCK)
    tl.store(lse_ptr + (n * heads + h) * L + first + row, top + tl.log2(total), mask=row < rows)


@jit
def _backward_tile(
    grad_ptr,  # [N, L, heads, D]
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    dq_ptr,  # [N, L, heads, D]
    dk_ptr,  # [N, L, heads, D]
    dv_ptr,  # [N, L, heads, D]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    d_n,  # of dq, dk and dv alike
    d_l,
    d_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,  # at least L
    BLOCK_D: tl.constexpr,
):
    _, n, h = _pair(1, heads)
    q = _load_rows(q_ptr + (n * q_n + h * q_h) * UNIT, q_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    k = _load_rows(k_ptr + (n * k_n + h * k_h) * UNIT, k_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    v = _load_rows(v_ptr + (n * v_n + h * v_h) * UNIT, v_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    grad = _load_rows(grad_ptr + (n * L * heads + h) * D, heads * D, L, D, BLOCK, BLOCK_D, EVEN)
    lse = _load_statistic(lse_ptr + (n * heads + h) * L, L, BLOCK)
    place = (n * d_n + h * d_h) * UNIT

    score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
    if not EVEN:  # a key that is not there has score 0, and e^(0 - lse) may be infinite
        score = tl.where((tl.arange(0, BLOCK) < L)[:, None], score, float("-inf"))
    p_t = tl.exp2(score * SCALE2 - lse[None, :])
    dv = tl.dot(p_t.to(grad.dtype), grad, input_precision="ieee")
    _store_rows(dv_ptr + place, dv, d_l * UNIT, L, D, BLOCK, BLOCK_D)

    dp_t = tl.dot(v, tl.trans(grad), input_precision="ieee")
    delta = tl.sum(p_t * dp_t, axis=0)  # rowsum(grad out), without reading out
    ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds_t, q, input_precision="ieee") * SCALE
    _store_rows(dk_ptr + place, dk, d_l * UNIT, L, D, BLOCK, BLOCK_D)
    dq = tl.dot(tl.trans(ds_t), k, input_precision="ieee") * SCALE
    _store_rows(dq_ptr + place, dq, d_l * UNIT, L, D, BLOCK, BLOCK_D)


@jit
def _backward_resident(
    grad_ptr,  # [N, L, heads, D]
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    dq_ptr,  # [N, L, heads, D]
    dk_ptr,  # [N, L, heads, D]
    dv_ptr,  # [N, L, heads, D]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    d_n,
    d_l,
    d_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,  # at least L
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, n, h = _pair(1, heads)
    k = _load_rows(k_ptr + (n * k_n + h * k_h) * UNIT, k_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    v = _load_rows(v_ptr + (n * v_n + h * v_h) * UNIT, v_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    q_ptr += (n * q_n + h * q_h) * UNIT
    grad_ptr += (n * L * heads + h) * D
    lse_ptr += (n * heads + h) * L
    place = (n * d_n + h * d_h) * UNIT
    dq_ptr += place

    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        q = _load_rows(q_ptr, q_l * UNIT, L - start, D, STEP, BLOCK_D, EVEN)
        grad = _load_rows(grad_ptr, heads * D, L - start, D, STEP, BLOCK_D, EVEN)
        lse = _load_statistic(lse_ptr + start, L - start, STEP)
        score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
        if not EVEN:  # a key that is not there has score 0, and e^(0 - lse) may be infinite
            score = tl.where((tl.arange(0, BLOCK) < L)[:, None], score, float("-inf"))
        p_t = tl.exp2(score * SCALE2 - lse[None, :])
        dv = tl.dot(p_t.to(grad.dtype), grad, dv, input_precision="ieee")
        dp_t = tl.dot(v, tl.trans(grad), input_precision="ieee")
        delta = tl.sum(p_t * dp_t, axis=0)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds_t, q, dk, input_precision="ieee")
        dq_t = tl.dot(tl.trans(k), ds_t, input_precision="ieee") * SCALE
        _store_rows(dq_ptr, tl.trans(dq_t), d_l * UNIT, L - start, D, STEP, BLOCK_D)
        q_ptr += STEP * q_l * UNIT
        grad_ptr += STEP * heads * D
        dq_ptr += STEP * d_l * UNIT
    _store_rows(dk_ptr + place, dk * SCALE, d_l * UNIT, L, D, BLOCK, BLOCK_D)
    _store_rows(dv_ptr + place, dv, d_l * UNIT, L, D, BLOCK, BLOCK_D)


@jit
def _delta(
    grad_ptr,  # [N, L, heads, D]
    out_ptr,  # [N, L, heads, D]
    delta_ptr,  # [N, heads, L]: sums of grad out over D
    L,
    heads,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, n, h = _pair(tl.cdiv(L, BLOCK), heads)
    first = block * BLOCK
    rows = L - first
    place = ((n * L + first) * heads + h) * D
    grad = _load_rows(grad_ptr + place, heads * D, rows, D, BLOCK, BLOCK_D, False).to(tl.float32)
    out = _load_rows(out_ptr + place, heads * D, rows, D, BLOCK, BLOCK_D, False).to(tl.float32)
    row = tl.arange(0, BLOCK)
    tl.store(delta_ptr + (n * heads + h) * L + first + row, tl.sum(grad * out, axis=1), mask=row < rows)


@jit
def _key_gradients(
    q_ptr,
    q_l,
    k,
    v,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    rows,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    EVEN: tl.constexpr,
    OF_K: tl.constexpr,
    OF_V: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of a block of keys, over all queries; zero where not wanted."""
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        q = _load_rows(q_ptr, q_l, L - start, D, STEP, BLOCK_D, EVEN)
        score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
        if not EVEN:
            score = tl.where((tl.arange(0, BLOCK) < rows)[:, None], score, float("-inf"))
        lse = _load_statistic(lse_ptr + start, L - start, STEP)
        p_t = tl.exp2(score * SCALE2 - lse[None, :])
        grad = _load_rows(grad_ptr, heads * D, L - start, D, STEP, BLOCK_D, EVEN)
        if OF_V:
            dv = tl.dot(p_t.to(grad.dtype), grad, dv, input_precision="ieee")
        if OF_K:
            dp_t = tl.dot(v, tl.trans(grad), input_precision="ieee")
            delta = _load_statistic(delta_ptr + start, L - start, STEP)
            ds_t = p_t * (dp_t - delta[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += STEP * q_l
        grad_ptr += STEP * heads * D
    return dk * SCALE, dv


@jit
def _query_gradients(
    q,
    k_ptr,
    k_l,
    v_ptr,
    v_l,
    grad,
    lse,
    delta,
    L,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of a block of queries, over all keys."""
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        k = _load_rows(k_ptr, k_l, L - start, D, STEP, BLOCK_D, EVEN)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not EVEN:
            score = tl.where((start + tl.arange(0, STEP) < L)[None, :], score, float("-inf"))
        p = tl.exp2(score * SCALE2 - lse[:, None])
        v = _load_rows(v_ptr, v_l, L - start, D, STEP, BLOCK_D, EVEN)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        k_ptr += STEP * k_l
        v_ptr += STEP * v_l
    return dq * SCALE


@jit
def _backward_stream(
    grad_ptr,  # [N, L, heads, D]
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    delta_ptr,  # [N, heads, L]
    dq_ptr,  # [N, L, heads, D]
    dk_ptr,  # [N, L, heads, D]
    dv_ptr,  # [N, L, heads, D]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    d_n,
    d_l,
    d_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    APART: tl.constexpr,  # dk and dv by two programs: together their sums do not fit in the registers
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, n, h = _pair(tl.cdiv(L, BLOCK), heads)
    first = block * BLOCK
    rows = L - first
    q_ptr += (n * q_n + h * q_h) * UNIT
    k_ptr += (n * k_n + h * k_h) * UNIT
    v_ptr += (n * v_n + h * v_h) * UNIT
    grad_ptr += (n * L * heads + h) * D
    lse_ptr += (n * heads + h) * L
    delta_ptr += (n * heads + h) * L
    place = (n * d_n + h * d_h + first * d_l) * UNIT

    job = tl.program_id(1)
    if job == 0:
        k = _load_rows(k_ptr + first * k_l * UNIT, k_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        v = _load_rows(v_ptr + first * v_l * UNIT, v_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        dk, dv = _key_gradients(
            q_ptr, q_l * UNIT, k, v, grad_ptr, lse_ptr, delta_ptr, rows, L, heads, D, SCALE, SCALE2, EVEN, True,
            not APART, BLOCK, STEP, BLOCK_D
        )  # fmt: skip
        _store_rows(dk_ptr + place, dk, d_l * UNIT, rows, D, BLOCK, BLOCK_D)
        if not APART:
            _store_rows(dv_ptr + place, dv, d_l * UNIT, rows, D, BLOCK, BLOCK_D)
    elif job == 1:
        q = _load_rows(q_ptr + first * q_l * UNIT, q_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        grad = _load_rows(grad_ptr + first * heads * D, heads * D, rows, D, BLOCK, BLOCK_D, EVEN)
        lse = _load_statistic(lse_ptr + first, rows, BLOCK)
        delta = _load_statistic(delta_ptr + first, rows, BLOCK)
        dq = _query_gradients(
            q, k_ptr, k_l * UNIT, v_ptr, v_l * UNIT, grad, lse, delta, L, D, SCALE, SCALE2, EVEN, BLOCK, STEP, BLOCK_D
        )
        _store_rows(dq_ptr + place, dq, d_l * UNIT, rows, D, BLOCK, BLOCK_D)
    elif APART:
        k = _load_rows(k_ptr + first * k_l * UNIT, k_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        _, dv = _key_gradients(
            q_ptr, q_l * UNIT, k, k, grad_ptr, lse_ptr, delta_ptr, rows, L, heads, D, SCALE, SCALE2, EVEN, False,
            True, BLOCK, STEP, BLOCK_D
        )  # fmt: skip
        _store_rows(dv_ptr + place, dv, d_l * UNIT, rows, D, BLOCK, BLOCK_D)


class Config(NamedTuple):
    """A kernel and how it is launched, for at most so many keys and columns."""

    keys: int | float
    columns: int
    kernel: Callable
    block: int  # rows that a program owns: queries forward; keys, then queries, backward
    step: int  # rows of the others that it takes at a time
    num_warps: int
    num_stages: int

    def fitted(self, length: int) -> "Config":
        """It, with no more rows than there are."""
        rows = max(next_power_of_2(length), 16)
        warps = max(self.num_warps * min(self.block, rows) // self.block, 1)
        return self._replace(block=min(self.block, rows), step=min(self.step, rows), num_warps=warps)


# The first that fits. 90, 100: 227 KB of shared memory, and matrix instructions that read it, of 64 and of 128 rows;
# 80: 163 KB; 86: 99 KB, which is what the other architectures have. Chosen by what the compiler reports (nothing
# spills), not by time yet.
ANY = math.inf
FORWARD = {
    90: (
        Config(256, 64, _forward_resident, 64, 256, 4, 2),
        Config(128, 128, _forward_resident, 64, 128, 4, 2),
        Config(64, 256, _forward_resident, 64, 64, 8, 2),
        Config(ANY, 64, _forward_stream, 128, 64, 4, 3),
        Config(ANY, 128, _forward_stream, 128, 64, 8, 3),
        Config(ANY, 256, _forward_stream, 128, 64, 8, 2),
    ),
    86: (
        Config(128, 64, _forward_resident, 64, 128, 4, 2),
        Config(64, 256, _forward_resident, 64, 64, 8, 2),
        Config(ANY, 64, _forward_stream, 128, 64, 4, 3),
        Config(ANY, 128, _forward_stream, 128, 32, 8, 2),
        Config(ANY, 256, _forward_stream, 64, 16, 4, 2),
    ),
}
BACKWARD = {
    90: (
        Config(64, 128, _backward_tile, 64, 64, 4, 1),
        Config(64, 256, _backward_tile, 64, 64, 8, 1),
        Config(128, 128, _backward_tile, 128, 128, 8, 1),
        Config(256, 64, _backward_resident, 256, 32, 8, 2),
        Config(ANY, 128, _backward_stream, 128, 64, 8, 2),
        Config(ANY, 256, _backward_stream, 128, 32, 8, 2),
    ),
    86: (
        Config(64, 128, _backward_tile, 64, 64, 4, 1),
        Config(32, 256, _backward_tile, 32, 32, 4, 1),
        Config(ANY, 32, _backward_stream, 128, 64, 8, 2),
        Config(ANY, 64, _backward_stream, 64, 64, 4, 2),
        Config(ANY, 128, _backward_stream, 64, 32, 4, 2),
        Config(ANY, 256, _backward_stream, 64, 16, 4, 2),
    ),
}
FORWARD[80], BACKWARD[80] = FORWARD[86], (Config(64, 256, _backward_tile, 64, 64, 8, 1), *BACKWARD[86])
FORWARD[100] = (*FORWARD[90][:-1], Config(ANY, 256, _forward_stream, 128, 32, 8, 2))
BACKWARD[100] = (*BACKWARD[90][:-2], Config(ANY, 64, _backward_stream, 128, 128, 8, 2), *BACKWARD[90][-2:])
FORWARD_FP32 = (
    Config(32, 64, _forward_resident, 32, 32, 4, 1),
    Config(ANY, 64, _forward_stream, 32, 16, 4, 1),
    Config(ANY, 128, _forward_stream, 32, 16, 8, 1),
)
BACKWARD_FP32 = (
    Config(32, 64, _backward_tile, 32, 32, 4, 1),
    Config(16, 128, _backward_tile, 16, 16, 4, 1),
    Config(ANY, 32, _backward_stream, 32, 16, 8, 1),
    Config(ANY, 64, _backward_stream, 32, 16, 4, 1),
    Config(ANY, 128, _backward_stream, 8, 16, 8, 1),
)


def _config(backward: bool, q: Tensor) -> Config:
    length, columns = q.shape[1], _columns(q)
    if q.dtype == torch.float32:
        configs = BACKWARD_FP32 if backward else FORWARD_FP32
    else:
        arch = arch_of(q.device)
        configs = (BACKWARD if backward else FORWARD)[{80: 80, 90: 90, 100: 100, 103: 100}.get(arch, 86)]
    return next(c for c in configs if length <= c.keys and columns <= c.columns).fitted(length)


def _columns(q: Tensor) -> int:
    return max(next_power_of_2(q.shape[3]), 16)


def _arguments(scale: float, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor | None = None) -> dict:
    """What all kernels but `_delta` take, of the tensors: strides in units of 8 elements where that is possible."""
    strides = {}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("d", gradient)):
        if tensor is not None:
            n, length, heads, _ = (stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape))
            strides |= {f"{name}_n": n, f"{name}_l": length, f"{name}_h": heads}
    unit = 8 if all(stride % 8 == 0 for stride in strides.values()) else 1
    arguments = {name: stride // unit for name, stride in strides.items()}
    arguments |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "L": q.shape[1], "heads": q.shape[2], "D": q.shape[3]}
    return arguments | {"SCALE2": scale * math.log2(math.e), "UNIT": unit, "BLOCK_D": _columns(q)}


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse."""
    n, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(n, heads, length, dtype=torch.float32, device=q.device)
    config = _config(False, q)
    blocks = cdiv(length, config.block)
    constants = {"BLOCK": config.block, "STEP": config.step}
    constants["EVEN"] = length % config.block == 0 and length % config.step == 0
    if config.kernel is _forward_resident:
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
    grid = (n * heads,)
    if config.kernel is not _backward_tile:
        arguments["STEP"] = config.step
    if config.kernel is _backward_stream:
        block = min(max(DELTA_TILE // _columns(q), 1), config.block)
        delta = torch.empty_like(lse)
        constants = {"L": length, "heads": heads, "D": dim, "BLOCK": block, "BLOCK_D": _columns(q)}
        delta_grid = (n * heads * cdiv(length, block),)
        launch(_delta, delta_grid, num_warps=4, grad_ptr=grad, out_ptr=out, delta_ptr=delta, **constants)
        apart = _columns(q) >= APART_COLUMNS
        grid = (n * heads * cdiv(length, config.block), 3 if apart else 2)
        arguments |= {"delta_ptr": delta, "APART": apart}
    launch(
        config.kernel,
        grid,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        EVEN=length % config.block == 0 and length % config.step == 0,
        **arguments,
    )


@torch.library.custom_op("pdfast_kernels::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, scale)


@_attention.register_fake
def _(q, k, v, scale):
    return _empty_outputs(q)


@torch.library.custom_op("pdfast_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(q)
    backward(grad, q, k, v, out, lse, scale, gradients)
    return gradients


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, scale):
    return _empty_gradients(q)


@torch.library.custom_op("pdfast_kernels::attention_packed", mutates_args=())
def _attention_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return forward(*qkv.unbind(2), scale)


@_attention_packed.register_fake
def _(qkv, scale):
    return _empty_outputs(qkv[:, :, 0])


@torch.library.custom_op("pdfast_kernels::attention_packed_backward", mutates_args=())
def _attention_packed_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    gradient = empty_gradient(qkv)
    backward(grad, *qkv.unbind(2), out, lse, scale, gradient.unbind(2))
    return gradient


@_attention_packed_backward.register_fake
def _(grad, qkv, out, lse, scale):
    return empty_gradient(qkv)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    n, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(n, heads, length, dtype=torch.float32, device=q.device)


def _empty_gradients(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))


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
    scale = q.shape[3] ** -0.5 if scale is None and q.shape[3] else scale
    if q.numel() and triton_runs("attention", q.device, unsupported(scale, q=q, k=k, v=v)):
        return _attention(q, k, v, scale)[0]
    return reference.attention(q, k, v, scale)


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` of q, k, v = the three parts of qkv [N, L, 3, heads, D]: [N, L, heads, D], contiguous.

    scale: 1/sqrt(D) unless said. See the module for layouts and dtypes. ValueError where a shape or dtype does not fit.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_packed: qkv has shape {tuple(qkv.shape)}, expected [N, L, 3, heads, D]")
    check_floating("attention_packed", qkv=qkv)
    scale = qkv.shape[4] ** -0.5 if scale is None and qkv.shape[4] else scale
    if qkv.numel() and triton_runs("attention_packed", qkv.device, unsupported(scale, qkv=qkv)):
        return _attention_packed(qkv, scale)[0]
    return reference.attention_packed(qkv, scale)


def unsupported(scale: float, **tensors: Tensor) -> str | None:
    """Why the kernels cannot take tensors [N, L, ..., D], or None."""
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
