"""Compiles launches for a GPU that is not there, in a process of its own: where the tests run, Triton interprets.

python -m tests.kernels.compiled ones           the launches of every operation with each integer argument 1: their Triton code
python -m tests.kernels.compiled norms SHAPE... group_norm of N,C,H,G: machine code for sm_90
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from functools import partial

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import static
from benchmarks.cases import Images, all_cases, attention_case, group_norm_case
from benchmarks.static import launches
from pdfast_kernels.runtime.launch import Launch

ARCH = 90
FEW_ROWS = [(2, 4096, 1, 1), (2, 6144, 1, 2)]


def works() -> Iterator[partial]:
    for case in all_cases():
        if case.quick:
            yield partial(case.make, 1, "cpu")
    for n, channels, size, groups in FEW_ROWS:
        yield partial(
            group_norm_case(Images("", n, channels, (size, size)), "bf16", "film+silu", groups).make, n, "cpu"
        )
    for positions, head_dim in ((256, 64), (1024, 64), (1024, 256)):
        yield partial(attention_case("", 1, positions, 1, head_dim, "bf16").make, 1, "cpu")


def to_triton(launch: Launch) -> None:
    """The first stage of the compiler: Python to Triton's own code. Raises what it says of a kernel it cannot take."""
    backend = make_backend(GPUTarget("cuda", ARCH, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    keywords = launch.arguments | {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "debug": False}
    bound, specialization, options = bind(**keywords)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    generated = backend.get_codegen_implementation(options)
    source.make_ir(GPUTarget("cuda", ARCH, 32), options, generated, backend.get_module_map(), context)


def ones() -> dict[str, list[str]]:
    """For each kernel, its integer arguments; "!" before those with which it does not compile if they are 1."""
    seen: dict[str, list[str]] = {}
    for make in works():
        for listed in launches(make, ARCH).values():
            for launch in listed:
                name = static.name_of(launch)
                if name in seen:
                    continue
                integers = [
                    p.name
                    for p in launch.kernel.params
                    if not p.is_constexpr and type(launch.arguments[p.name]) is int  # strides and sizes
                ]
                seen[name] = []
                for changed in [(i,) for i in integers] + [tuple(integers)]:
                    one = dataclasses.replace(launch, arguments=launch.arguments | dict.fromkeys(changed, 1))
                    try:
                        to_triton(one)
                        seen[name].append(",".join(changed))
                    except Exception as error:
                        seen[name].append(f"!{','.join(changed)}: {type(error).__name__}")
    return seen


def norms(shapes: list[str]) -> list[dict]:
    rows = []
    for shape in shapes:
        n, channels, size, groups = map(int, shape.split(","))
        make = partial(
            group_norm_case(Images("", n, channels, (size, size)), "bf16", "film+silu", groups).make, n, "cpu"
        )
        for listed in launches(make, ARCH).values():
            for launch in listed:
                start = time.process_time()
                code = static.compiled(launch, ARCH)
                rows.append(
                    {
                        "shape": shape,
                        "kernel": code.kernel,
                        "instructions": code.instructions,
                        "registers": code.registers,
                        "stack": code.stack,
                        "seconds": time.process_time() - start,
                    }
                )
    return rows


if __name__ == "__main__":
    what, *shapes = sys.argv[1:]
    print(json.dumps(ones() if what == "ones" else norms(shapes)))
