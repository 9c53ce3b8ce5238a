"""The tables of benchmarks.static, in plain text and in Markdown.

`main`, `C % 8`, `others`: the widths in bits of the accesses of main tensors (see benchmarks.gate), of main tensors
where 16 bytes of a row do not lie together, and of statistics, parameters and partial sums.
"""

from collections import defaultdict
from itertools import chain
from typing import Any

from benchmarks.gate import is_main

Row = dict[str, Any]

KERNEL_COLUMNS = (
    "kernel", "sm", "shapes", "regs", "spills", "shared", "main", "C % 8", "others", "matrix", "fp64", "atomics",
    "code", "gate",
)  # fmt: skip
MOVED = ("must", "ours", "eager", "touched")
TRAFFIC_COLUMNS = ("operation", "case", "pass", "samples", *MOVED, *(f"{what}/must" for what in MOVED[1:]), "")


def plain(kernels: list[Row], moved: list[Row], versions: dict[str, str]) -> str:
    tables = ("", _kernel_table(kernels)), ("KiB moved\n", _traffic_table(moved))
    return "\n\n".join([*(title + _aligned(table) for title, table in tables if len(table) > 1), _header(versions)])


def markdown(kernels: list[Row], moved: list[Row], versions: dict[str, str]) -> str:
    lines = [f"# What the compiler made of the kernels\n\n{_header(versions)}\n"]
    for title, table in (("Machine code", _kernel_table(kernels)), ("KiB moved", _traffic_table(moved))):
        rule = ["---"] * len(table[0])
        lines += [f"## {title}\n", *(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:])), ""]
    return "\n".join(lines)


def _header(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _kernel_table(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line for each kernel and architecture; over its shapes a range, or the worst."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["arch"]].append(row)
    return [KERNEL_COLUMNS, *(_kernel_line(*key, group) for key, group in groups.items())]


def _kernel_line(kernel: str, arch: int, rows: list[Row]) -> tuple[str, ...]:
    failed = sum(bool(row["failures"]) for row in rows)
    verdict = f"{failed} of {len(rows)} FAIL" if failed else "pass"
    read = [row for row in rows if "registers" in row]
    if not read:
        return (kernel, str(arch), str(len(rows)), *["-"] * (len(KERNEL_COLUMNS) - 4), verdict)
    widths = {"main": set(), "C % 8": set(), "others": set()}
    for row in read:
        for access in row["accesses"]:
            is_one = is_main(access["argument"], row["main"])
            widths["others" if not is_one else "main" if row["width"] else "C % 8"].add(access["bits"])
    return (
        kernel,
        str(arch),
        str(len(rows)),
        _range(row["registers"] for row in read),
        _worst(row["stack"] for row in read),
        _worst(row["shared"] for row in read),
        *map(_widths, widths.values()),
        " ".join(sorted(set(chain.from_iterable(row["matrix"] for row in read)))) or "-",
        _worst(sum(row["float64"].values()) for row in read),
        _worst(sum(row["atomics"].values()) for row in read),
        _range(row["instructions"] for row in read),
        verdict,
    )


def _range(values) -> str:
    values = list(values)
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _worst(values) -> str:
    return str(max(values))


def _widths(bits: set[int]) -> str:
    return " ".join("bulk" if b > 256 else str(b) for b in sorted(bits)) or "-"


def _traffic_table(rows: list[Row]) -> list[tuple[str, ...]]:
    def line(row: Row) -> tuple[str, ...]:
        kib = (f"{row[what] / 1024:.0f}" if row[what] is not None else "-" for what in MOVED)
        ratios = (f"{row[what] / row['must']:.2f}" if row[what] is not None else "-" for what in MOVED[1:])
        return row["op"], row["case"], row["pass"], str(row["samples"]), *kib, *ratios, row.get("unavailable", "")

    return [TRAFFIC_COLUMNS, *map(line, rows)]


def _aligned(table: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table)
    return "\n".join("  ".join(row).rstrip() for row in rows)
