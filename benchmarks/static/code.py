"""What the compiler made of one launch: its kernel compiled for a GPU that need not be there, its machine code read.

The launch is specialised by Triton's own binder, as it is at run time: an int of 1 becomes a constant, an int divisible
by 16 and a pointer to 16 bytes are marked so, None is a constant.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.static.ptx import BULK, Access, Place, accesses_of
from benchmarks.work import Work
from pdfast_kernels import use
from pdfast_kernels.runtime import dispatch
from pdfast_kernels.runtime.launch import Launch, recorded

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")
_LINE = re.compile(r'^\s*//## File "(.*)", line (\d+)')
LOADS, STORES = r"LDG|LDGSTS|UBLKCP|UTMALDG", r"STG|UTMASTG"


def _opcode(mnemonic: str) -> str:
    return mnemonic.partition(".")[0]


def _bits(mnemonic: str) -> int:
    """LDG.E.128 -> 128, LDG.E.U16 -> 16, LDG.E -> 32."""
    widths = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", mnemonic)
    return BULK if mnemonic.startswith("U") else int(widths[0]) if widths else 32


def _by_width(mnemonic: str) -> str:
    return _opcode(mnemonic) + ("" if (bits := _bits(mnemonic)) == BULK else f".{bits}")


COUNTED = {
    "spills": ("LDL|STL", str),
    "loads": (LOADS, _by_width),
    "stores": (STORES, _by_width),
    "matrix": (r"[HIQBO]G?MMA|UTC\w*MMA", _opcode),
    "float64": (r"D(ADD|MUL|FMA|SETP|MNMX|MMA)|.*\.F64|.*64H", str),
    "atomics": ("ATOM|ATOMG|RED|REDG|UTMAREDG", str),
}
"""Instructions, and what they are counted as."""


@dataclass(frozen=True)
class Code:
    """A compiled kernel. Instructions are counted as they stand in the code; the dicts go from instruction to count."""

    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int  # bytes of local memory a thread: spilled registers, and arrays that could not be kept in registers
    shared: int  # bytes a block
    tensor_memory: int  # columns a block, of the 512 that sm_100 has
    instructions: int
    spills: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    matrix: dict[str, int]
    float64: dict[str, int]
    atomics: dict[str, int]
    multiplies: bool  # whether the source asks for a matrix product (tl.dot)
    accesses: tuple[Access, ...]  # of global memory in the PTX, each with the argument that its address comes from
    narrowed: dict[str, str]
    """Arguments of which the machine code has narrower accesses than the PTX, and where: ptxas loads what is used."""


_codes: dict[str, Code] = {}


@contextmanager
def kernels_wanted() -> Iterator[None]:
    """Within it, operations on CPU tensors go to their kernels: interpreted or, without the interpreter, recorded."""
    with use("triton"), mock.patch.object(dispatch, "INTERPRETED", True):
        yield


def launches(make: Callable[[], Work], arch: int) -> dict[str, list[Launch]]:
    """What the forward and the backward of the work launch, configured for sm_`arch`. Nothing is computed."""
    with kernels_wanted(), recorded(arch):
        work = make()
        return work.passes(work.kernels, partial(recorded, arch))[0]


def name_of(launch: Launch) -> str:
    """group_norm._apply: the module and the function."""
    return f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__}"


def compiled(launch: Launch, arch: int) -> Code:
    """The launch compiled for sm_`arch`; once for all launches that come to the same compilation."""
    given = {**launch.arguments, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", arch, 32)
    without_gpu = SimpleNamespace(
        get_current_device=lambda: f"sm_{arch}", get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    with mock.patch.object(triton.runtime.driver, "_active", without_gpu):
        made = launch.kernel.warmup(grid=launch.grid, **given)
    if made.hash not in _codes:
        _codes[made.hash] = _read(made, name_of(launch), arch, launch.num_warps)
    return _codes[made.hash]


def versions() -> dict[str, str]:
    """Of triton, and of the ptxas it brings for older GPUs and for sm_100."""
    return {"triton": triton.__version__, "ptxas": get_ptxas(90).version, "ptxas for sm_100": get_ptxas(100).version}


def _read(made: Any, name: str, arch: int, num_warps: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tools = (
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage"],
            [triton.knobs.nvidia.nvdisasm.path, "-c", "-g", "-ndf"],
        )
        usage, sass = (
            subprocess.check_output([*tool, file.name], stderr=subprocess.DEVNULL, text=True) for tool in tools
        )
    registers, stack = (int(re.search(rf"\b{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    counts, narrowest = _instructions(sass)
    passed = {name: type_ for name, type_ in made.src.signature.items() if type_ != "constexpr"}
    parameters = [name if type_.startswith("*") else None for name, type_ in passed.items()]
    accesses = accesses_of(made.asm["ptx"], parameters)
    least: dict[Place, int] = {}  # bits in PTX
    for place, _, _, bits in accesses:
        least[place] = min(bits, least.get(place, BULK))
    counted: dict[str, Counter[str]] = {kind: Counter() for kind in COUNTED}
    for mnemonic, n in sorted(counts.items()):
        for kind, (pattern, named) in COUNTED.items():
            if re.match(rf"(?:{pattern})\b", mnemonic):
                counted[kind][named(mnemonic)] += n
    tensor_memory = getattr(made.metadata, "tmem_size", None) or 0
    return Code(
        *(name, arch, num_warps, registers, stack, made.metadata.shared, tensor_memory, counts.total()),
        **{kind: dict(of_kind) for kind, of_kind in counted.items()},
        multiplies="tt.dot" in made.asm["ttir"],
        accesses=tuple(Access(*what, n) for what, n in sorted(Counter(access[1:] for access in accesses).items())),
        narrowed={
            argument: f"{narrowest[place]} bits instead of {least[place]} in line {place[1]} of {place[0]}"
            for place, argument, *_ in sorted(accesses, reverse=True)
            if narrowest.get(place, BULK) < least[place]
        },
    )


def _instructions(sass: str) -> tuple[Counter[str], dict[Place, int]]:
    """How often each instruction stands in the code, and the narrowest access of global memory of each source line."""
    counts, narrowest, place = Counter(), {}, ("", 0)
    for line in sass.splitlines():
        if moved := _LINE.match(line):
            place = moved[1].rpartition("/")[2], int(moved[2])
        elif instruction := _INSTRUCTION.match(line):
            mnemonic = instruction[1]
            counts[mnemonic] += 1
            if re.fullmatch(f"{LOADS}|{STORES}", _opcode(mnemonic)):
                narrowest[place] = min(narrowest.get(place, BULK), _bits(mnemonic))
    return counts, narrowest
