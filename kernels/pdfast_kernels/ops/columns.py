"""Coefficients of samples beside images: what several operations share, in their kernels and in plain PyTorch."""

from torch import Tensor

from pdfast_kernels.runtime.index import rows_of
from pdfast_kernels.runtime.triton import jit, tl


@jit
def element(index_ptr, M, R, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the program's sample, its elements and which of them exist, the sample's row of [R, ...], and whether that exists."""
    blocks = tl.cdiv(M, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index_ptr + n) if INDEXED else n
    return n, e, e < M, row, (row >= 0) & (row < R)


@jit
def coefficient(pointer, there):
    """Return the coefficient, NaN where there is none."""
    return tl.load(pointer, mask=there, other=float("nan"))


@jit
def part_of(e, p, RUN: tl.constexpr, P: tl.constexpr):
    """Return where element e of part p lies among a sample's P parts, RUN elements of each together."""
    return e if P == 1 else (e // RUN) * (P * RUN) + p * RUN + e % RUN


def like(coefficient: Tensor, z: Tensor) -> Tensor:
    return coefficient.view(-1, *(1,) * (z.dim() - 1))


def combine(output: Tensor, coefficient: Tensor) -> Tensor:
    """sum_p coefficient[:, p] * output_p: [N, P*C, ...] and [N, P] -> [N, C, ...]."""
    parts = output.chunk(coefficient.shape[1], dim=1)
    return sum(like(coefficient[:, p], part) * part for p, part in enumerate(parts))  # type: ignore[return-value]


def table_rows(column: Tensor, index: Tensor | None) -> Tensor:
    """Return the rows of a table, in float32 at least, as in the kernels: with them all that follows is."""
    rows = rows_of(column, index)
    return rows.float() if rows.dtype.itemsize < 4 else rows
