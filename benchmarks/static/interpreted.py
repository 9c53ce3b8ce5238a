"""The bytes that an operation's kernels move, next to those that it must move and that eager PyTorch does.

ours      of each kernel, in Triton's interpreter, the 32-byte sectors that it loads and those that it stores: what
          crosses the memory bus if the L2 cache serves whatever a kernel reads again. And ATen's operations between
          the kernels, as for eager
touched   ours, but every element of every load and store, as often as it is touched: what crosses the L2 cache at most

At a few samples (see the case): all are proportional to them, but for the parameters.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.errors import InterpreterError

from benchmarks.cases import all_cases
from benchmarks.command import Row
from benchmarks.traffic import AtenBytes, must_and_eager
from benchmarks.work import Case, Work, kernels_wanted

SECTOR = 32


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


def _in_the_interpreter(cases: list[Case]) -> list[Row]:
    """{pass: {"ours", "touched"}} of each case, or {"unavailable": reason}: from a process where Triton interprets."""
    if not cases:
        return []
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    wanted = json.dumps([case.full_name for case in cases])
    command = [sys.executable, "-c", "from benchmarks.static.interpreted import main; main()"]
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


def main() -> None:
    torch.set_num_threads(1)
    by_name = {case.full_name: case for case in all_cases()}
    asked = [by_name[name] for name in json.load(sys.stdin)]
    print(json.dumps([_interpreted(case.make(case.counted, "cpu")) for case in asked]))
