"""How kernels are launched: for each kind of launch one table, from architecture and shape to a row.

The rows are heuristics. Nothing is tuned while a program runs: `python -m benchmarks.tune` times other rows when asked, and
prints those that would replace the ones here.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        self.name, self.rows = name, dict(rows)
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
