"""Kernels that each do one thing the gate must see, and some that do none.

`python -m tests.benchmarks.throwaway 90` prints what the reader and the gate say of them on sm_90, as JSON: {name:
{"failures": [...], ...}}. `... gate` is benchmarks.static on one that fails.
"""

import dataclasses
import json
import sys
from unittest import mock

import torch
import triton
import triton.language as tl

from benchmarks import static
from benchmarks.static.gate import failures, main_arguments
from benchmarks.work import Case
from pdfast_kernels.runtime.launch import Launch


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def strided(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * 3, mask=i < n), mask=i < n)


@triton.jit
def table(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    from_table = tl.load(x_ptr + tl.program_id(1)).to(tl.pointer_type(tl.bfloat16))
    tl.store(y_ptr + i, tl.load(from_table + i, mask=i < n), mask=i < n)


@triton.jit
def parameter(x_ptr, y_ptr, bias_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n) + tl.load(bias_ptr + i % 7)
    tl.store(y_ptr + i, x, mask=i < n)


@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float64)
    tl.store(y_ptr + i, (x * x + 1).to(tl.bfloat16), mask=i < n)


@triton.jit
def atomic(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def spill(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    total = tl.sum(x.to(tl.float32), axis=0)
    tl.store(y_ptr + i, (tl.exp(x.to(tl.float32)) / total).to(tl.bfloat16))


@triton.jit
def product(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, 64):
        a = tl.load(x_ptr + i[:, None] * n + start + k[None, :])
        b = tl.load(y_ptr + (start + k)[:, None] * BLOCK + i[None, :])
        total = tl.dot(a, b, total)
    tl.store(z_ptr + i[:, None] * BLOCK + i[None, :], total.to(tl.bfloat16))


def _launches() -> dict[str, Launch]:
    def tensor(dtype=torch.bfloat16, size=1 << 16):
        return torch.empty(size, dtype=dtype, device="meta")

    x, y, bias, pointers = tensor(), tensor(), tensor(size=7), tensor(torch.int64, 4)
    floats, more = tensor(torch.float32), tensor(torch.float32)

    def launch(kernel, block=1024, warps=4, n=1 << 16, **tensors):
        return Launch(kernel, (1,), {**tensors, "n": n, "BLOCK": block}, warps, 3)

    return {
        "copy": launch(copy, x_ptr=x, y_ptr=y),
        "odd copy": launch(copy, x_ptr=x, y_ptr=y, n=1001),
        "strided": launch(strided, x_ptr=x, y_ptr=y),
        "table": launch(table, x_ptr=pointers, y_ptr=y),
        "parameter": launch(parameter, x_ptr=x, y_ptr=y, bias_ptr=bias),
        "double": launch(double, x_ptr=x, y_ptr=y),
        "atomic": launch(atomic, x_ptr=floats, y_ptr=more),
        "spill": launch(spill, x_ptr=x, y_ptr=y, block=1 << 16),
        "product": launch(product, x_ptr=x, y_ptr=y, z_ptr=tensor(), block=64),
        "small product": launch(product, x_ptr=x, y_ptr=y, z_ptr=tensor(), block=16),
        "large product": launch(product, x_ptr=floats, y_ptr=more, z_ptr=tensor(), block=256, warps=8),
    }


def report(arch: int) -> None:
    everything = {}
    for name, launch in _launches().items():
        code = static.compiled(launch, arch)
        reasons = failures(code, main_arguments(launch, [launch]), width=128, tensor_cores=True)
        everything[name] = {"failures": reasons, **dataclasses.asdict(code)}
    print(json.dumps(everything))


def fail() -> int:
    """The command itself, with one case that does not pass."""
    case = Case("strided", "", "65536 elements", 1, make=lambda samples, device: None, width=128)
    launches = {"forward": [_launches()["strided"]]}
    with mock.patch.multiple(static, chosen_cases=lambda *_: [case], launches=lambda *_: launches):
        return static.main(["--arch", "90"])


if __name__ == "__main__":
    sys.exit(fail() if sys.argv[1] == "gate" else report(int(sys.argv[1])))
