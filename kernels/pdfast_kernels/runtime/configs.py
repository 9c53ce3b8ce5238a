"""How kernels are launched: for each kind of launch one table, from architecture and shape to a row.

The rows are heuristics. Nothing is tuned while a program runs: `python -m benchmarks.tune` times other rows when asked, and
prints those that would replace the ones here.

In a kernel repository (kernels/assemble.py) the rows are those of its files configs/any.json, configs/sm_90.json and so on: by the
table's name a list of rows, each an object of its fields, where null is unbounded and a kernel is its name.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ANY = 0
"""In place of an architecture: those that have no rows of their own."""
UNBOUNDED = math.inf

Row = Any
"""A NamedTuple. Its first fields are the largest sizes that it is for, in the order in which `Table.row` takes them."""


class Blocks(NamedTuple):
    """Of a kernel that works through the elements of a sample (or of a tensor) in blocks."""

    elements: float
    block: int
    num_warps: int


class Lookup(NamedTuple):
    """What a launch asked for, and got."""

    table: "Table"
    arch: int
    sizes: tuple[int, ...]
    row: Row


_listening: list[list[Lookup]] = []


class Table:
    """The rows of one kind of launch, by architecture (80, 90, ..., or ANY).

    Of an architecture's rows the first is taken whose sizes are all at least the launch's.
    """

    def __init__(self, name: str, rows: Mapping[int, tuple[Row, ...]]) -> None:
        self.name, self.rows = name, dict(rows) | _rows_in_files(name, rows)
        self._overrides: list[tuple[Row, ...]] = []

    def row(self, arch: int, *sizes: int) -> Row:
        """Return the row for a launch of these sizes on sm_`arch`."""
        tables = *reversed(self._overrides), self.rows.get(arch, self.rows[ANY])
        row = next(
            row for rows in tables for row in rows if all(size <= most for size, most in zip(sizes, row, strict=False))
        )
        for lookups in _listening:
            lookups.append(Lookup(self, arch, sizes, row))
        return row

    @contextmanager
    def overridden(self, *rows: Row) -> Iterator[None]:
        """Within it, these rows come before the table's own, on every architecture, in all threads: autograd's look there too."""
        with _added(self._overrides, rows):
            yield


def kernel_name(kernel: Any) -> str:
    """Return the name of a kernel's function, compiled or interpreted."""
    return getattr(kernel, "fn", kernel).__name__


@cache
def _files() -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Return the parsed files of the package by architecture; none in the package itself, whose rows are in the code."""
    files = (Path(__file__).parents[1] / "configs").glob("*.json")
    return {
        ANY if file.stem == "any" else int(file.stem.removeprefix("sm_")): json.loads(file.read_text())
        for file in files
    }


def _rows_in_files(name: str, rows: Mapping[int, tuple[Row, ...]]) -> dict[int, tuple[Row, ...]]:
    """Return the rows that the files have for a table; `rows`, those in the code, say of what type they are."""
    kind = type(rows[ANY][0])
    kernels = {
        kernel_name(value): value for listed in rows.values() for row in listed for value in row if callable(value)
    }

    def decoded(value: Any) -> Any:
        return UNBOUNDED if value is None else kernels[value] if isinstance(value, str) else value

    return {
        arch: tuple(kind(**{field: decoded(value) for field, value in row.items()}) for row in tables[name])
        for arch, tables in _files().items()
        if name in tables
    }


@contextmanager
def looked_up() -> Iterator[list[Lookup]]:
    """Within it, what the launches of all threads ask the tables for is listed."""
    lookups: list[Lookup] = []
    with _added(_listening, lookups):
        yield lookups


@contextmanager
def _added(entries: list, entry: Any) -> Iterator[None]:
    """Within it `entry` is among the entries; it alone leaves at the end, in whichever order threads come and go."""
    entries.append(entry)
    try:
        yield
    finally:
        del entries[next(i for i, other in enumerate(entries) if other is entry)]
