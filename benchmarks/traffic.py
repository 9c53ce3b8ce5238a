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
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.errors import InterpreterError

from benchmarks.cases import all_cases
from benchmarks.command import Row
from benchmarks.work import Case, Work, kernels_wanted

SECTOR = 32
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def count(cases: list[Case]) -> list[Row]:
    """A row for each case and pass: {"op", "case", "pass", "samples", "must", "ours", "eager", "touched"}, in bytes;
    where the interpreter failed, "ours" and "touched" are None and "unavailable" is the reason."""
    rows = []
    for case, ours in zip(cases, _in_the_interpreter(cases), strict=True):
        for direction, (must, eager) in must_and_eager(case.make(case.counted, "meta")).items():
            row = {"op": case.op, "case": case.name, "pass": direction, "samples": case.counted}
            measured = ours.get(direction) or {"ours": None, "touched": None, **ours}
            rows.append(row | {"must": must, "eager": eager, **measured})
    return rows


def must_and_eager(work: Work) -> dict[str, tuple[int, int]]:
    """Bytes that must move and those that eager PyTorch moves, in the forward and, if there is one, the backward."""
    return {name: (_bytes(must), eager.bytes) for name, eager, must in _passes(work, _AtenBytes)}


def flops(work: Work) -> dict[str, int]:
    """The floating-point operations of the matrix products."""
    counting = partial(FlopCounterMode, display=False)
    return {name: counter.get_total_flops() for name, counter, _ in _passes(work, counting)}


def _passes(work: Work, counting: Callable[[], Any]) -> Iterator[tuple[str, Any, list[Tensor]]]:
    """The plain passes of work on meta tensors, each with what has counted it, and the tensors that must move."""
    with mock.patch.object(F, "scaled_dot_product_attention", _flash_attention):
        with counting() as counter:
            result = work.plain()
        yield "forward", counter, [*work.reads, *_tensors(result), *work.writes]
        if work.differentiated:
            gradient = torch.empty_like(result)
            with counting() as counter:
                work.gradients(result, gradient)
            yield "backward", counter, [gradient, *work.reads_again, *work.differentiated]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of the tensors as they lie in memory: what is expanded counts once."""
    sizes = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors)
    return sum(n * t.element_size() for n, t in zip(sizes, tensors, strict=True))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
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


def _in_the_interpreter(cases: list[Case]) -> list[Row]:
    """{pass: {"ours", "touched"}} of each case, or {"unavailable": reason}: from a process where Triton interprets."""
    if not cases:
        return []
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    wanted = json.dumps([case.full_name for case in cases])
    command = [sys.executable, "-m", "benchmarks.traffic"]
    done = subprocess.run(command, input=wanted, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _interpreted(work: Work) -> Row:
    try:
        with kernels_wanted():
            with _counted() as forward:
                result = work.kernels()
            if not work.differentiated:
                return {"forward": forward}
            gradient = torch.zeros_like(result)
            with _counted() as backward:
                work.gradients(result, gradient)
        return {"forward": forward, "backward": backward}
    except InterpreterError as error:  # triton 3.6.0 does not loop over a kernel's argument under numpy 2.4
        return {"unavailable": f"{error}"}


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts what is loaded and stored within it, by the two functions that every access of the interpreter ends in;
    at its end "ours" and "touched" are there."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.interpreter import interpreter_builder as builder

    aten, moved = _AtenBytes(), {"ours": 0, "touched": 0}
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    by_name = {case.full_name: case for case in all_cases()}
    asked = [by_name[name] for name in json.load(sys.stdin)]
    print(json.dumps([_interpreted(case.make(case.counted, "cpu")) for case in asked]))
