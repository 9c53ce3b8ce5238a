"""`python -m benchmarks.static`: what the compiler made of every kernel, and the bytes that it moves, without a GPU.

The kernels are compiled for each architecture, at the shapes of benchmarks.cases, and their machine code is read; then
the bytes that each operation moves are counted. Exit code 1 if a kernel does not pass the gate (benchmarks.machine_code),
each with its shape and the reason; 2, in one line, for a bad argument.

`main`, `C % 8`, `others`: the widths in bits of the accesses of main tensors, of main tensors where 16 bytes of a row do
not lie together, and of statistics, parameters and partial sums. Over a kernel's shapes a range is given, or the worst.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine_code, traffic
from benchmarks.cases import all_cases
from benchmarks.command import Parser, Row, header, reason
from benchmarks.work import Case, launches
from pdfast_kernels._triton import INTERPRETED
from pdfast_kernels.launch import Launch

COMPILED_FOR = tuple(machine_code.SHARED_MEMORY)
REFUSED = "TRITON_INTERPRET=1 is set, and Triton would interpret the kernels, not compile them: unset it"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks.static", description="The machine code of every kernel, and the bytes it moves.")
    cases = all_cases()
    ops = list(dict.fromkeys(case.op for case in cases))
    parser.add_argument("--arch", type=int, nargs="+", choices=COMPILED_FOR, default=COMPILED_FOR, help="capabilities")
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help="the operations; all of them unless said")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each operation")
    options = parser.parse(arguments)
    if INTERPRETED:
        parser.error(REFUSED)

    cases = [case for case in cases if case.op in options.op and (case.quick or not options.quick)]
    kernels: list[Row] = []
    for arch, case in tqdm([(arch, case) for arch in options.arch for case in cases], leave=False, disable=None):
        kernels += read(case, launches(partial(case.make, case.samples, "cpu"), arch), arch)
    moved = traffic.count([case for case in cases if case.counted])
    versions = header() | machine_code.versions()
    failed = [
        f"{row['kernel']} sm_{row['arch']}, {row['op']} {row['case']}: {why}"
        for row in kernels
        for why in row["failures"]
    ]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    tables = f"## Machine code\n\n{_table(_kernels(kernels))}\n\n## KiB moved\n\n{_table(_moved(moved))}\n"
    print(f"{said}\n\n{tables}")
    if options.markdown:
        options.markdown.write_text(f"# What the compiler made of the kernels\n\n{said}\n\n{tables}")
    if options.json:
        report = {"versions": versions, "kernels": kernels, "traffic": moved, "failures": failed}
        options.json.write_text(json.dumps(report, separators=(",", ":")).replace('},{"op"', '},\n{"op"') + "\n")
    print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
    print(f"{len(kernels)} launches of {len(cases)} cases: {f'{len(failed)} FAILURES' if failed else 'all pass'}")
    return 1 if failed else 0


def read(case: Case, passes: dict[str, list[Launch]], arch: int) -> list[Row]:
    """A row for each of the case's launches, with the reasons for which it does not pass the gate."""
    everything = [launch for listed in passes.values() for launch in listed]
    rows = []
    for direction, listed in passes.items():
        for launch in listed:
            row = {"op": case.op, "case": case.name, "pass": direction, "grid": launch.grid, "width": case.width}
            try:
                code = machine_code.read(launch, arch)
            except Exception as error:  # whatever the compiler says is a finding, and the other kernels are still read
                row |= {"kernel": machine_code.name_of(launch), "arch": arch}
                rows.append(row | {"failures": [f"does not compile: {reason(error)}"]})
                continue
            main_arguments = machine_code.main_arguments(launch, everything) - set(case.narrow)
            reasons = machine_code.failures(code, main_arguments, case.width, case.tensor_cores)
            rows.append(row | asdict(code) | {"main": sorted(main_arguments), "failures": reasons})
    return rows


def _kernels(rows: list[Row]) -> list[dict[str, Any]]:
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
                main = machine_code.is_main(access["argument"], row["main"])
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


def _moved(rows: list[Row]) -> list[dict[str, Any]]:
    lines = []
    for row in rows:
        line = {"operation": row["op"], **{name: row[name] for name in ("case", "pass", "samples")}}
        kib = {name: row[name] for name in ("must", "ours", "eager", "touched")}
        line |= {name: "-" if value is None else f"{value / 1024:.0f}" for name, value in kib.items()}
        ratios = {name: kib[name] for name in ("ours", "eager", "touched")}
        line |= {f"{k}/must": "-" if v is None else f"{v / row['must']:.2f}" for k, v in ratios.items()}
        lines.append(line | {"": row.get("unavailable", "")})
    return lines


def _table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, aligned."""
    if not rows:
        return "none"
    lines = [[*rows[0]], *([f"{value}" or "-" for value in row.values()] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    texts = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([texts[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *texts[1:]])


if __name__ == "__main__":
    sys.exit(main())
