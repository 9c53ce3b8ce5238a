"""The bytes an operation moves: what it must, what its kernels do, what eager PyTorch does.

must      each input of the operation read once, each result written once; backward, also the result's gradient and
          those inputs that the gradients depend on
ours      of each kernel, in Triton's interpreter, the 32-byte sectors that it loads and those that it stores: what
          crosses the memory bus if the L2 cache serves whatever a kernel reads again. And ATen's operations between
          the kernels, as for eager
eager     the inputs and outputs of each ATen operation of the plain implementation, views and allocations left out, as
          the dispatcher of a GPU would call them (attention: one flash kernel)
touched   ours, but every element of every load and store, as often as it is touched: what crosses the L2 cache at most

At a few samples (see the case): all are proportional to them, but for the parameters.
"""

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.errors import InterpreterError

from benchmarks.cases import Case, all_cases
from benchmarks.work import Work, kernels_wanted

SECTOR = 32
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

Row = dict[str, Any]


def count(cases: list[Case]) -> list[Row]:
    """A row for each case and pass: {"op", "case", "pass", "samples", "must", "ours", "eager", "touched"}, in bytes;
    where the interpreter failed, "ours" and "touched" are None and "unavailable" is the reason."""
    rows = []
    for case, ours in zip(cases, _in_the_interpreter(cases), strict=True):
        must, eager = must_and_eager(case.make(case.counted, "meta"))
        for direction in must:
            row = {"op": case.op, "case": case.name, "pass": direction, "samples": case.counted}
            measured = ours.get(direction) or {"ours": None, "touched": None, **ours}
            rows.append(row | {"must": must[direction], "eager": eager[direction], **measured})
    return rows


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of the tensors as they lie in memory: what is expanded counts once."""
    sizes = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors)
    return sum(n * t.element_size() for n, t in zip(sizes, tensors, strict=True))


def must_and_eager(work: Work) -> tuple[dict[str, int], dict[str, int]]:
    must, eager = {}, {}
    with mock.patch.object(F, "scaled_dot_product_attention", flash_attention):
        with _AtenBytes() as counted:
            result = work.plain()
        must["forward"] = _bytes([*work.reads, *_tensors(result), *work.writes])
        eager["forward"] = counted.bytes
        if work.differentiated:
            gradient = torch.empty_like(result)
            with _AtenBytes() as counted:
                work.gradients(result, gradient)
            must["backward"] = _bytes([gradient, *work.reads_again, *work.differentiated])
            eager["backward"] = counted.bytes
    return must, eager


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """What scaled_dot_product_attention is on a GPU; on meta tensors it would be taken apart."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]


class _AtenBytes(TorchDispatchMode):
    """Counts the bytes of ATen's operations within it, also of those inside our own operations on CPU tensors."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "pdfast_kernels":
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        read, written = _tensors((args, kwargs)), _tensors(result)
        if result is None:  # in place, on lists
            changed = [arg for arg, said in zip(args, func._schema.arguments, strict=False) if said.is_write]
            written = _tensors(changed)
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = func.is_view and all(t.untyped_storage()._cdata in storages for t in written)  # `to` may be one
        if not is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.bytes += _bytes([*read, *written])
        return result


def _in_the_interpreter(cases: list[Case]) -> list[dict[str, Any]]:
    """{pass: {"ours", "touched"}} of each case, or {"unavailable": reason}: from a process where Triton interprets."""
    if not cases:
        return []
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    wanted = json.dumps([case.full_name for case in cases])
    command = [sys.executable, "-m", "benchmarks.traffic"]
    done = subprocess.run(command, input=wanted, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _interpreted(work: Work) -> dict[str, Any]:
    try:
        return _interpreted_passes(work)
    except InterpreterError as error:  # triton 3.6.0 does not loop over a kernel's argument under numpy 2.4
        return {"unavailable": f"{error}"}


def _interpreted_passes(work: Work) -> dict[str, dict[str, int]]:
    moved = {}
    with kernels_wanted():
        with _counted() as count:
            result = work.kernels()
        moved["forward"] = count.bytes()
        if work.differentiated:
            gradient = torch.zeros_like(result)
            with _counted() as count:
                work.gradients(result, gradient)
            moved["backward"] = count.bytes()
    return moved


@dataclass
class _Count:
    """Of kernels in the interpreter."""

    aten: _AtenBytes
    touched: int = 0
    sectors: int = 0
    of_kernel: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"load": [], "store": []})

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """A load or store of elements of `size` bytes."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)]
        self.touched += addresses.size * size
        self.of_kernel[kind].append(np.unique(addresses // SECTOR))

    def end_kernel(self) -> None:
        for sectors in self.of_kernel.values():
            if sectors:
                self.sectors += np.unique(np.concatenate(sectors)).size
            sectors.clear()

    def bytes(self) -> dict[str, int]:
        return {"ours": SECTOR * self.sectors + self.aten.bytes, "touched": self.touched + self.aten.bytes}


@contextmanager
def _counted() -> Iterator[_Count]:
    """Counts what is loaded and stored within it, by the two functions that every access of the interpreter ends in."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.interpreter import interpreter_builder as builder

    count = _Count(_AtenBytes())

    def counting(kind: str, access: Callable) -> Callable:
        parameters = inspect.signature(access)

        def counted(pointers, *args, **kwargs):
            mask = parameters.bind(pointers, *args, **kwargs).arguments["mask"].data
            count.access(kind, pointers.data, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return access(pointers, *args, **kwargs)

        return counted

    interpreted = InterpretedFunction.run

    def run(*args, **kwargs):
        with _disable_current_modes():  # the interpreter's own work on tensors moves nothing on a GPU
            interpreted(*args, **kwargs)
        count.end_kernel()

    with (
        mock.patch.object(builder, "create_masked_load", counting("load", builder.create_masked_load)),
        mock.patch.object(builder, "create_masked_store", counting("store", builder.create_masked_store)),
        mock.patch.object(InterpretedFunction, "run", run),
        count.aten,
    ):
        yield count


def main() -> None:
    torch.set_num_threads(1)
    by_name = {case.full_name: case for case in all_cases()}
    cases = [by_name[name] for name in json.load(sys.stdin)]
    print(json.dumps([_interpreted(case.make(case.counted, "cpu")) for case in cases]))


if __name__ == "__main__":
    main()
