"""The tables of benchmarks.static.

`main`, `C % 8`, `others`: the widths in bits of the accesses of main tensors, of main tensors where 16 bytes of a row do
not lie together, and of statistics, parameters and partial sums. Over a kernel's shapes a range is given, or the worst.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from benchmarks.command import Row
from benchmarks.static.gate import is_main


def of_kernels(rows: list[Row]) -> list[dict[str, Any]]:
    """A line for each kernel and architecture."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["arch"]].append(row)
    lines = []
    for (kernel, arch), group in groups.items():
        failed, code = sum(bool(row["failures"]) for row in group), [row for row in group if "registers" in row]
        widths: dict[str, set[int]] = {"main": set(), "C % 8": set(), "others": set()}
        for row in code:
            for access in row["accesses"]:
                main = is_main(access["argument"], row["main"])
                widths["others" if not main else "main" if row["width"] else "C % 8"].add(access["bits"])
        lines.append(
            {
                "kernel": kernel,
                "sm": arch,
                "shapes": len(group),
                "regs": _range(row["registers"] for row in code),
                "spills": max((row["stack"] for row in code), default="-"),
                "shared": max((row["shared"] for row in code), default="-"),
                **{name: " ".join("bulk" if b > 256 else f"{b}" for b in sorted(w)) for name, w in widths.items()},
                "matrix": " ".join(sorted({name for row in code for name in row["matrix"]})),
                "fp64": max((sum(row["float64"].values()) for row in code), default="-"),
                "atomics": max((sum(row["atomics"].values()) for row in code), default="-"),
                "code": _range(row["instructions"] for row in code),
                "gate": f"{failed} of {len(group)} FAIL" if failed else "pass",
            }
        )
    return lines


def _range(values: Iterable[int]) -> str:
    listed = sorted(values)
    return "-".join(map(str, dict.fromkeys([*listed[:1], *listed[-1:]])))


def of_bytes(rows: list[Row]) -> list[dict[str, Any]]:
    lines = []
    for row in rows:
        line = {"operation": row["op"], **{name: row[name] for name in ("case", "pass", "samples")}}
        kib = {name: row[name] for name in ("must", "ours", "eager", "touched")}
        line |= {name: "-" if value is None else f"{value / 1024:.0f}" for name, value in kib.items()}
        ratios = {name: kib[name] for name in ("ours", "eager", "touched")}
        line |= {f"{k}/must": "-" if v is None else f"{v / row['must']:.2f}" for k, v in ratios.items()}
        lines.append(line | {"": row.get("unavailable", "")})
    return lines


def markdown(rows: list[dict[str, Any]]) -> str:
    """In Markdown, aligned."""
    if not rows:
        return "none"
    lines = [[*rows[0]], *([f"{value}" or "-" for value in row.values()] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    texts = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([texts[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *texts[1:]])
