"""What a kernel must not do, and how its machine code shows that it does.

    no spills             no local memory: STACK 0 and no LDL, STL
    on-chip memory        shared memory and tensor memory within the chip's
    wide accesses         where 16 bytes of a row lie together (for images: C % 8 == 0), every load and store of a main
                          tensor moves 128 bits a thread, or more, or is the copy engine's; a case may say another
                          width. A main tensor is one of at least 1 KiB and an eighth of the case's largest:
                          activations, not statistics, parameters, partial sums or integer tables. An address that came
                          out of memory (a table of pointers) counts as a main tensor's
    tensor cores          where the case says so, a kernel with a matrix product uses the chip's instruction for it
    no float64, no atomics

`failures` gives the reasons, one line each.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor

from benchmarks.static.code import Code
from benchmarks.static.ptx import IN_MEMORY
from pdfast_kernels.runtime.launch import Launch

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes a block may have, by architecture."""
TENSOR_MEMORY = 512
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
MAIN_SHARE, MAIN_BYTES = 1 / 8, 1024


def main_arguments(launch: Launch, launches: list[Launch]) -> set[str]:
    """The launch's arguments that are main tensors, among all those of the launches of its case."""
    largest = max(_bytes(value) for other in launches for value in other.arguments.values())
    least = max(MAIN_SHARE * largest, MAIN_BYTES)
    return {name for name, value in launch.arguments.items() if _bytes(value) >= least} | {IN_MEMORY}


def failures(code: Code, main: set[str], width: int, tensor_cores: bool) -> list[str]:
    """Why the kernel does not pass, one line each. `width`: of the accesses of main tensors, in bits, or 0 for any."""
    arch, cores, shared = f"sm_{code.arch}", TENSOR_CORES[code.arch], SHARED_MEMORY[code.arch]
    narrow = [str(access) for access in code.accesses if access.bits < width and is_main(access.argument, main)]
    narrowed = [f"{name}, {where}" for name, where in code.narrowed.items() if width and is_main(name, main)]
    used = any(re.fullmatch(cores, mnemonic) for mnemonic in code.matrix)
    too_much = code.shared > shared, code.tensor_memory > TENSOR_MEMORY
    wrong = {
        f"spills: {code.stack} bytes of local memory a thread {_list(code.spills)}".rstrip(): code.stack or code.spills,
        f"shared memory: {code.shared} bytes a block, {arch} has {shared}": too_much[0],
        f"tensor memory: {code.tensor_memory} columns a block, {arch} has {TENSOR_MEMORY}": too_much[1],
        f"float64: {_list(code.float64)}": code.float64,
        f"atomics: {_list(code.atomics)}": code.atomics,
        f"narrow: {', '.join(narrow)}": narrow,
        **{f"narrowed: {line}": True for line in narrowed},
        f"tensor cores: no {cores} but {_list(code.matrix) or 'no matrix instruction at all'}": tensor_cores
        and code.multiplies
        and not used,
    }
    return [reason for reason, applies in wrong.items() if applies]


def is_main(argument: str, main: Collection[str]) -> bool:
    """Whether an access of `argument`, which may be of several ("x_ptr or y_ptr"), is one of a main tensor."""
    return not set(argument.split(" or ")).isdisjoint(main)


def _bytes(value: object) -> int:
    """Of a tensor of values; integers are indices, addresses and places, but for bytes, which are images."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.uint8):
        return value.numel() * value.element_size()
    return 0


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())
