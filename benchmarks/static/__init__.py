"""`python -m benchmarks.static`: what the compiler made of every kernel, and the bytes that it moves, without a GPU.

The kernels are compiled for each architecture, at the shapes of benchmarks.cases, and their machine code is read; then
the bytes that each operation moves are counted. Exit code 1 if a kernel does not pass the gate (benchmarks.static.gate),
each with its shape and the reason; 2, in one line, for a bad argument.

In the first table `main`, `C % 8` and `others` are the widths in bits of the accesses of main tensors, of main tensors where 16
bytes of a row do not lie together, and of statistics, parameters and partial sums; over a kernel's shapes a range, or the worst.

From elsewhere: `read(case, launches, arch)`, a row for each launch; `Code`, what there is to know of one.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.cases import add_choice_of_cases, chosen_cases
from benchmarks.command import Parser, Row, header, reason
from benchmarks.static import traffic
from benchmarks.static.code import Code, compiled, launches, name_of, versions
from benchmarks.static.gate import SHARED_MEMORY, failures, is_main, main_arguments
from benchmarks.work import Case
from pdfast_kernels.runtime.launch import Launch
from pdfast_kernels.runtime.triton import INTERPRETED

__all__ = ["COMPILED_FOR", "REFUSED", "Code", "compiled", "launches", "main", "name_of", "read"]
COMPILED_FOR = tuple(SHARED_MEMORY)
REFUSED = "TRITON_INTERPRET=1 is set, and Triton would interpret the kernels, not compile them: unset it"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks.static", description="The machine code of every kernel, and the bytes it moves.")
    add_choice_of_cases(parser)
    parser.add_argument("--arch", type=int, nargs="+", choices=COMPILED_FOR, default=COMPILED_FOR, help="capabilities")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_json()
    options = parser.parse(arguments)
    if INTERPRETED:
        parser.error(REFUSED)
    if not (cases := chosen_cases(parser, options)):
        return 0
    kernels: list[Row] = []
    for arch, case in tqdm([(arch, case) for arch in options.arch for case in cases], leave=False, disable=None):
        kernels += read(case, launches(partial(case.make, case.samples, "cpu"), arch), arch)
    moved, said = traffic.count(cases), header() | versions()
    failed = [
        "{kernel} sm_{arch}, {op} {case}: {why}".format(why=why, **row) for row in kernels for why in row["failures"]
    ]
    first = ", ".join(f"{name} {version}" for name, version in said.items())
    tables = f"## Machine code\n\n{markdown(of_kernels(kernels))}\n\n## KiB moved\n\n{markdown(of_bytes(moved))}\n"
    print(f"{first}\n\n{tables}")
    if options.markdown:
        options.markdown.write_text(f"# What the compiler made of the kernels\n\n{first}\n\n{tables}")
    if options.json:
        report = {"versions": said, "kernels": kernels, "traffic": moved, "failures": failed}
        options.json.write_text(json.dumps(report, separators=(",", ":")).replace('},{"op"', '},\n{"op"') + "\n")
    print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
    print(f"{len(kernels)} launches of {len(cases)} cases: {f'{len(failed)} FAILURES' if failed else 'all pass'}")
    return 1 if failed else 0


def read(case: Case, passes: dict[str, list[Launch]], arch: int) -> list[Row]:
    """A row for each of the case's launches, with the reasons for which it does not pass the gate."""
    everything, rows = [launch for listed in passes.values() for launch in listed], []
    for direction, launch in [(name, launch) for name, listed in passes.items() for launch in listed]:
        row = {"op": case.op, "case": case.name, "pass": direction, "grid": launch.grid, "width": case.width}
        try:
            code = compiled(launch, arch)
            large = main_arguments(launch, everything) - set(case.narrow)
            wrong = failures(code, large, case.width, case.tensor_cores)
            rows.append(row | asdict(code) | {"main": sorted(large), "failures": wrong})
        except Exception as error:  # whatever the compiler says is a finding, and the other kernels are still read
            wrong = [f"does not compile: {reason(error)}"]
            rows.append(row | {"kernel": name_of(launch), "arch": arch, "failures": wrong})
    return rows


def of_kernels(rows: list[Row]) -> list[Row]:
    """A line for each kernel and architecture."""
    groups, lines = defaultdict(list), []
    for row in rows:
        groups[row["kernel"], row["arch"]].append(row)
    for (kernel, arch), group in groups.items():
        failed, code = sum(bool(row["failures"]) for row in group), [row for row in group if "registers" in row]
        widths: dict[str, set[int]] = {"main": set(), "C % 8": set(), "others": set()}
        for row in code:
            for access in row["accesses"]:
                main = is_main(access["argument"], row["main"])
                widths["others" if not main else "main" if row["width"] else "C % 8"].add(access["bits"])
        values = {name: [row[name] for row in code] for name in ("registers", "stack", "shared", "instructions")}
        most = {name: max((sum(row[name].values()) for row in code), default="-") for name in ("float64", "atomics")}
        ranges = {name: "-".join(str(n) for n in sorted({min(v), max(v)})) if v else "-" for name, v in values.items()}
        line = {"kernel": kernel, "sm": arch, "shapes": len(group), "regs": ranges["registers"]}
        line |= {"spills": max(values["stack"], default="-"), "shared": max(values["shared"], default="-")}
        line |= {name: " ".join("bulk" if b > 256 else f"{b}" for b in sorted(w)) for name, w in widths.items()}
        line |= {"matrix": " ".join(sorted({name for row in code for name in row["matrix"]})), "fp64": most["float64"]}
        line |= {"atomics": most["atomics"], "code": ranges["instructions"]}
        lines.append(line | {"gate": f"{failed} of {len(group)} FAIL" if failed else "pass"})
    return lines


def of_bytes(rows: list[Row]) -> list[Row]:
    """A line for each case and pass."""
    lines, moved = [], ("ours", "eager", "touched")
    for row in rows:
        line = {"operation": row["op"], **{name: row[name] for name in ("case", "pass", "samples")}}
        line |= {k: "-" if row[k] is None else f"{row[k] / 1024:.0f}" for k in ("must", *moved)}
        line |= {f"{k}/must": "-" if row[k] is None else f"{row[k] / row['must']:.2f}" for k in moved}
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
