"""Indices of rows and of samples: one that is out of range is an error, or NaN; never another row.

On a CPU the values are asked, and a wrong one is a ValueError. On a GPU that would be a wait, so that what is computed for such a
sample is NaN, by the kernels and by plain PyTorch alike; with `PDFAST_KERNELS_DEBUG=1` the host waits and raises there too.
"""

import os

import torch
from torch import Tensor

from pdfast_kernels.runtime.namespace import in_namespace

DEBUG = os.environ.get("PDFAST_KERNELS_DEBUG", "0") not in ("", "0")


def check_index(op: str, index: Tensor | None, samples: int) -> None:
    """Raise a ValueError unless it is None or int64 [samples]."""
    if index is None:
        return
    if tuple(index.shape) != (samples,):
        raise ValueError(f"{op}: index has shape {tuple(index.shape)}, expected ({samples},)")
    if index.dtype != torch.int64:
        raise ValueError(f"{op}: index is {index.dtype}, expected torch.int64")


def in_range(op: str, name: str, index: Tensor, first: int, end: int) -> Tensor:
    """`index`, int64 [N]. ValueError for a value outside of [first, end), wherever values are asked."""
    if not asked(index):
        return index
    if torch.compiler.is_compiling():
        return _in_range(index, f"{op}: {name}", first, end)
    _raise_outside(index, f"{op}: {name}", first, end)
    return index


def rows_of(column: Tensor, index: Tensor | None) -> Tensor:
    """column[index], of floats [R, ...] and the values that `in_range` has seen; NaN where it could not ask and they are out of
    range. The column itself without an index."""
    if index is None:
        return column
    if index.device.type == "cpu" and asked(index):
        return column[index]
    inside = (index >= 0) & (index < len(column))
    if not len(column):
        return column.new_full((len(index), *column.shape[1:]), torch.nan)
    rows = column[torch.where(inside, index, 0)]
    return torch.where(inside.view(-1, *(1,) * (column.dim() - 1)), rows, torch.nan)


def asked(index: Tensor) -> bool:
    """Tell whether the values are asked: not of a GPU, and not of tensors that stand for others (vmap, fake tensors,
    tracing)."""
    if index.device.type != "cpu" and not (DEBUG and index.device.type == "cuda"):
        return False
    if torch.compiler.is_compiling():
        return True
    of_itself = type(index) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(
        index
    )
    return of_itself and not torch.jit.is_tracing()


def _raise_outside(index: Tensor, what: str, first: int, end: int) -> None:
    if not index.numel() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    least, most = (int(value) for value in torch.aminmax(index))
    if least < first or most >= end:
        place = int(((index < first) | (index >= end)).nonzero()[0, 0])
        expected = f"{first} to {end - 1}" if end > first else "no value, of an empty table"
        raise ValueError(f"{what}[{place}] is {int(index[place])}, expected {expected}")


@torch.library.custom_op(in_namespace("in_range"), mutates_args=())
def _in_range(index: Tensor, what: str, first: int, end: int) -> Tensor:
    """Return a copy, so that a compiler keeps it."""
    _raise_outside(index, what, first, end)
    return index.clone()


@_in_range.register_fake
def _(index, what, first, end):
    return torch.empty_like(index)
