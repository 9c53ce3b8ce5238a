"""The loads and stores of global memory in a kernel's PTX: how wide each is, and which argument its address comes from.

PTX names every value once, so an address leads back, through arithmetic alone, to the pointer parameter that it was
made of. An address that itself came out of memory (a table of pointers) leads to no parameter.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

IN_MEMORY = "an address in memory"
BULK = 1024
"""Stands for the width of an access by the copy engine, which moves whole tiles."""

SCRATCH = ("scratch memory", "profiling memory")
"""The two pointers that Triton adds to every kernel's parameters."""

Place = tuple[str, int]  # file name, line


@dataclass(frozen=True)
class Access:
    """`count` loads or stores of `bits` bits a thread, of the argument's tensor."""

    argument: str
    kind: str
    bits: int
    count: int

    def __str__(self) -> str:
        width = "bulk copies" if self.bits == BULK else f"{self.bits}-bit {self.kind}s"
        return f"{self.count} {width} of {self.argument}"


@dataclass
class Line:
    """What a source line accesses: the narrowest of its accesses, in bits, and all the arguments."""

    bits: int
    arguments: set[str]


_STATEMENT = re.compile(r"^(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.+)$")
_LOC = re.compile(r"^\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*?)"', re.MULTILINE)
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
_GLOBAL = re.compile(r"(ld|st)\.(\w+\.)*global\b")
_WIDTH = re.compile(r"\.(?:v(\d+)\.)?[bfus](8|16|32|64|128)$")


def accesses_of(ptx: str, parameters: list[str | None]) -> tuple[tuple[Access, ...], dict[Place, Line]]:
    """The accesses, in all and by source line. `parameters`: the kernel's in order, the pointers by name."""
    if (pointers := ptx.count(".ptr .global")) != (expected := len(parameters) - parameters.count(None) + len(SCRATCH)):
        raise ValueError(f"the kernel has {pointers} pointers in PTX and {expected} in its signature")
    definitions: dict[str, list[str]] = {}
    found: list[tuple[Place, str, int, str]] = []  # kind, bits, address
    files = {int(number): path.rpartition("/")[2] for number, path in _FILE.findall(ptx)}
    place = ("", 0)
    for statement in _statements(ptx):
        if moved := _LOC.match(statement):
            place = files[int(moved[1])], int(moved[2])
        elif parsed := _STATEMENT.match(statement):
            if access := _access(*parsed.groups()):
                found.append((place, *access))
            _define(definitions, *parsed.groups())
    names = {n: name for n, name in enumerate([*parameters, *SCRATCH]) if name}

    @cache
    def origin(address: str) -> str:
        return " or ".join(names[n] for n in _origins(definitions, address) if n in names) or IN_MEMORY

    counts = Counter((origin(address), kind, bits) for _, kind, bits, address in found)
    lines: dict[Place, Line] = {}
    for place, _, bits, address in found:
        line = lines.setdefault(place, Line(bits, set()))
        line.bits = min(line.bits, bits)
        line.arguments.add(origin(address))
    return tuple(Access(*what, count) for what, count in sorted(counts.items())), lines


def _statements(ptx: str) -> Iterator[str]:
    for line in ptx.splitlines():
        for statement in line.partition("//")[0].split(";"):
            if statement := statement.strip().lstrip("{ \t"):
                yield statement


def _access(opcode: str, operands: str) -> tuple[str, int, str] | None:
    """(load or store, bits, the address), if the statement accesses global memory."""
    addresses = re.findall(r"\[([^\]]*)\]", operands)
    if opcode.startswith("cp.async") and ".global" in opcode:
        store = ".global.shared" in opcode and not opcode.startswith("cp.async.c")
        if ".bulk" in opcode:
            return "store" if store else "load", BULK, addresses[0 if store else 1]
        return "load", 8 * int(operands.split("]")[2].split(",")[1], 0), addresses[1]
    if _GLOBAL.match(opcode):
        vector, bits = _WIDTH.search(opcode).groups()
        return "load" if opcode.startswith("ld") else "store", int(vector or 1) * int(bits), addresses[0]
    return None


def _define(definitions: dict[str, list[str]], opcode: str, operands: str) -> None:
    """Note what the statement's results are made of: registers and parameters, nothing if they come out of memory."""
    results, _, sources = operands.partition("}" if operands.startswith("{") else ",")
    made_of = [] if opcode.startswith(("ld.", "atom.")) and "param" not in opcode else [sources]
    for register in _REGISTER.findall(results):
        definitions.setdefault(register, []).extend(made_of)


def _origins(definitions: dict[str, list[str]], address: str) -> list[int]:
    """The numbers of the 64-bit parameters an address is made of."""
    origins, seen, ahead = set(), set(), [address]
    while ahead:
        text = ahead.pop()
        origins.update(int(n) for n in _PARAMETER.findall(text))
        new = set(_REGISTER.findall(text)) - seen
        seen |= new
        for register in new:
            ahead.extend(definitions.get(register, ()))
    return sorted(origins)
