"""The loads and stores of global memory in a kernel's PTX: how wide each is, and which argument its address comes from.

PTX names every value once, so an address leads back, through arithmetic alone, to the pointer parameter that it was
made of. An address that itself came out of memory (a table of pointers) leads to no parameter.
"""

import re
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


_STATEMENT = re.compile(r"^(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.+)$")
_LOC = re.compile(r"^\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*?)"', re.MULTILINE)
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
_GLOBAL = re.compile(r"(ld|st)\.(\w+\.)*global\b")
_WIDTH = re.compile(r"\.(?:v(\d+)\.)?[bfus](8|16|32|64|128)$")


def accesses_of(ptx: str, parameters: list[str | None]) -> list[tuple[Place, str, str, int]]:
    """The place, the argument, the kind and the bits of each access. parameters: the kernel's in order, the pointers by name."""
    if (pointers := ptx.count(".ptr .global")) != (expected := len(parameters) - parameters.count(None) + len(SCRATCH)):
        raise ValueError(f"the kernel has {pointers} pointers in PTX and {expected} in its signature")
    made_of: dict[str, list[str]] = {}
    found: list[tuple[Place, str, int, str]] = []  # kind, bits, address
    files = {number: path.rpartition("/")[2] for number, path in _FILE.findall(ptx)}
    place = ("", 0)
    for statement in re.split(r"[;\n]", re.sub("//.*", "", ptx)):
        statement = statement.strip().lstrip("{ \t")
        if moved := _LOC.match(statement):
            place = files[moved[1]], int(moved[2])
        elif parsed := _STATEMENT.match(statement):
            opcode, operands = parsed.groups()
            if access := _access(opcode, operands):
                found.append((place, *access))
            # What the results are made of: registers and parameters, nothing if they come out of memory.
            results, _, sources = operands.partition("}" if operands.startswith("{") else ",")
            from_memory = opcode.startswith(("ld.", "atom.")) and "param" not in opcode
            for register in _REGISTER.findall(results):
                made_of.setdefault(register, []).extend([] if from_memory else [sources])
    names = {n: name for n, name in enumerate([*parameters, *SCRATCH]) if name}

    @cache
    def origin(address: str) -> str:
        return " or ".join(names[n] for n in _origins(made_of, address) if n in names) or IN_MEMORY

    return [(place, origin(address), kind, bits) for place, kind, bits, address in found]


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


def _origins(made_of: dict[str, list[str]], address: str) -> list[int]:
    """The numbers of the 64-bit parameters an address is made of."""
    origins, seen, ahead = set(), set(), [address]
    while ahead:
        text = ahead.pop()
        origins.update(int(n) for n in _PARAMETER.findall(text))
        new = set(_REGISTER.findall(text)) - seen
        seen |= new
        for register in new:
            ahead.extend(made_of.get(register, ()))
    return sorted(origins)
