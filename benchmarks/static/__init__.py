"""`python -m benchmarks.static`: what the compiler made of every kernel, and the bytes that it moves, without a GPU.

The kernels are compiled for each architecture, at the shapes of benchmarks.cases, and their machine code is read; then
the bytes that each operation moves are counted. Exit code 1 if a kernel does not pass the gate (benchmarks.static.gate),
each with its shape and the reason; 2, in one line, for a bad argument.

From elsewhere: `read(case, launches, arch)`, a row for each launch; `Code`, what there is to know of one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.cases import all_cases
from benchmarks.command import Parser, Row, header, reason
from benchmarks.static import traffic
from benchmarks.static.code import Code, compiled, launches, name_of, versions
from benchmarks.static.gate import SHARED_MEMORY, failures, main_arguments
from benchmarks.static.tables import markdown, of_bytes, of_kernels
from benchmarks.work import Case
from pdfast_kernels.runtime.launch import Launch
from pdfast_kernels.runtime.triton import INTERPRETED

__all__ = ["COMPILED_FOR", "REFUSED", "Code", "compiled", "launches", "main", "name_of", "read"]
COMPILED_FOR = tuple(SHARED_MEMORY)
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
    moved = traffic.count(cases)
    said = header() | versions()
    failed = [
        f"{row['kernel']} sm_{row['arch']}, {row['op']} {row['case']}: {why}"
        for row in kernels
        for why in row["failures"]
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
    everything = [launch for listed in passes.values() for launch in listed]
    rows = []
    for direction, listed in passes.items():
        for launch in listed:
            row = {"op": case.op, "case": case.name, "pass": direction, "grid": launch.grid, "width": case.width}
            try:
                code = compiled(launch, arch)
            except Exception as error:  # whatever the compiler says is a finding, and the other kernels are still read
                row |= {"kernel": name_of(launch), "arch": arch}
                rows.append(row | {"failures": [f"does not compile: {reason(error)}"]})
                continue
            large = main_arguments(launch, everything) - set(case.narrow)
            reasons = failures(code, large, case.width, case.tensor_cores)
            rows.append(row | asdict(code) | {"main": sorted(large), "failures": reasons})
    return rows
