"""Coefficients of samples beside images, in plain PyTorch: what the references of several operations share."""

from torch import Tensor

from pdfast_kernels.runtime.index import rows_of


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
