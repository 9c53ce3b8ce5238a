"""The bytes that an operation's kernels move, next to those that it must move and that eager PyTorch does.

eager     the inputs and outputs of each ATen operation of the plain implementation, views and allocations left out, as
          the dispatcher of a GPU would call them (attention: one flash kernel)
ours      of each kernel, in Triton's interpreter, the 32-byte sectors that it loads and those that it stores: what
          crosses the memory bus if the L2 cache serves whatever a kernel reads again. And ATen's operations between
          the kernels, as for eager
touched   ours, but every element of every load and store, as often as it is touched: what crosses the L2 cache at most

At a few samples (see the case): all are proportional to them, but for the parameters.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest import mock

import numpy as np
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.errors import InterpreterError

from benchmarks.cases import all_cases
from benchmarks.command import Row
from benchmarks.static.code import kernels_wanted
from benchmarks.work import Case, bytes_of, must_move, tensors_in

SECTOR = 32
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
COUNTED_TOO = (
    "ddim_step imagenet64 16x3x64 P=2 NCHW fp32",
    "group_norm imagenet64 16x192x64 film+silu bf16",
    "group_norm sd15 4x320x64 silu fp16",
    "attention imagenet64 16x256x9x64 packed bf16",
    "attention sd15 4x256x8x160 fp16",
    "group_norm_attention cifar10 2x256x16 heads=1 bf16",
)


def samples_of(case: Case) -> int:
    """The number of samples at which its bytes are counted; 0: they are not. Few, since the interpreter takes seconds, but
    enough that weights, where there are any, are the lesser part."""
    few = {"group_norm_attention": 8, "adam_ema": 1}.get(case.op, 2)
    return few if case.quick or case.full_name in COUNTED_TOO else 0


def count(cases: list[Case]) -> list[Row]:
    """A row for each case and pass: {"op", "case", "pass", "samples", "must", "ours", "eager", "touched"}, in bytes;
    where the interpreter failed, "ours" and "touched" are None and "unavailable" is the reason."""
    rows, cases = [], [case for case in cases if samples_of(case)]
    process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # of its own: there Triton interprets
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), process:
        all_ours = process.map(_interpreted, [case.full_name for case in cases])
        for case, ours in zip(cases, all_ours, strict=True):
            for direction, (must, eager) in must_move(case.make(samples_of(case), "meta"), AtenBytes).items():
                row = {"op": case.op, "case": case.name, "pass": direction, "samples": samples_of(case)}
                measured = ours.get(direction) or {"ours": None, "touched": None, **ours}
                rows.append(row | {"must": must, "eager": eager.bytes, **measured})
    return rows


class AtenBytes(TorchDispatchMode):
    """Counts the bytes of ATen's operations within it, also of those inside our own operations on CPU tensors."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "pdfast_kernels":
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        read, written = tensors_in((args, kwargs)), tensors_in(result)
        if result is None:  # in place, on lists
            changed = [arg for arg, said in zip(args, func._schema.arguments, strict=False) if said.is_write]
            written = tensors_in(changed)
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = func.is_view and all(t.untyped_storage()._cdata in storages for t in written)  # `to` may be one
        if not is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.bytes += bytes_of([*read, *written])
        return result


def _interpreted(full_name: str) -> Row:
    """{pass: {"ours", "touched"}} of the case, or {"unavailable": reason}."""
    torch.set_num_threads(1)
    [case] = [case for case in all_cases() if case.full_name == full_name]
    work = case.make(samples_of(case), "cpu")
    try:
        with kernels_wanted():
            return work.passes(work.kernels, _counted)[0]
    except InterpreterError as error:  # triton 3.6.0 does not loop over a kernel's argument under numpy 2.4
        return {"unavailable": f"{error}"}


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts what is loaded and stored within it, by the two functions that every access of the interpreter ends in;
    at its end "ours" and "touched" are there."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.interpreter import interpreter_builder as builder

    aten, moved = AtenBytes(), {"ours": 0, "touched": 0}
    sectors: dict[str, list[np.ndarray]] = {"load": [], "store": []}  # of the kernel that runs

    def counting(kind: str, access: Callable) -> Callable:
        parameters = inspect.signature(access)

        def counted(pointers, *args, **kwargs):
            mask = parameters.bind(pointers, *args, **kwargs).arguments["mask"].data
            addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
            moved["touched"] += addresses.size * (pointers.get_element_ty().primitive_bitwidth // 8)
            sectors[kind].append(np.unique(addresses // SECTOR))
            return access(pointers, *args, **kwargs)

        return counted

    interpreted = InterpretedFunction.run

    def run(*args, **kwargs):
        with _disable_current_modes():  # the interpreter's own work on tensors moves nothing on a GPU
            interpreted(*args, **kwargs)
        for of_kind in sectors.values():
            moved["ours"] += SECTOR * np.unique(np.concatenate(of_kind or [[]])).size
            of_kind.clear()

    with (
        mock.patch.object(builder, "create_masked_load", counting("load", builder.create_masked_load)),
        mock.patch.object(builder, "create_masked_store", counting("store", builder.create_masked_store)),
        mock.patch.object(InterpretedFunction, "run", run),
        aten,
    ):
        yield moved
    for what in moved:
        moved[what] += aten.bytes
