"""What the compiler made of every kernel, without a GPU: python -m benchmarks.static [--arch 80 90 100] [--op NAME ...]
[--json FILE] [--markdown FILE] [--quick].

The kernels are compiled for each architecture, at the shapes of benchmarks.cases, and their machine code is read; then
the bytes that each operation moves are counted. Exit code 1 if a kernel does not pass the gate (benchmarks.gate), each
with its shape and the reason; 2, in one line, for a bad argument.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import gate, machine_code, tables, traffic
from benchmarks.arguments import Parser
from benchmarks.cases import Case, all_cases
from benchmarks.header import header
from benchmarks.work import launches
from pdfast_kernels._triton import INTERPRETED
from pdfast_kernels.launch import Launch

COMPILED_FOR = tuple(gate.SHARED_MEMORY)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.static", description="The machine code of every kernel, and the bytes it moves.")
    cases = all_cases()
    ops = list(dict.fromkeys(case.op for case in cases))
    parser.add_argument("--arch", type=int, nargs="+", choices=COMPILED_FOR, default=COMPILED_FOR, help="capabilities")
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, help="the operations; all of them unless said")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each operation")
    args = parser.parse_args(arguments)
    parser.check_writable(args.json, args.markdown)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and Triton would interpret the kernels, not compile them: unset it")

    cases = [case for case in cases if case.op in args.op and (case.quick or not args.quick)]
    compiled = tqdm([(case, arch) for arch in args.arch for case in cases], leave=False, disable=None)
    kernels = []
    for case, arch in compiled:
        kernels += read(case, launches(partial(case.make, case.samples, "cpu"), arch), arch)
    moved = traffic.count([case for case in cases if case.counted])
    versions = header() | machine_code.versions()
    failed = [
        f"{row['kernel']} sm_{row['arch']}, {row['op']} {row['case']}: {reason}"
        for row in kernels
        for reason in row["failures"]
    ]

    print(tables.plain(kernels, moved, versions))
    if args.markdown:
        args.markdown.write_text(tables.markdown(kernels, moved, versions))
    if args.json:
        report = {"versions": versions, "kernels": kernels, "traffic": moved, "failures": failed}
        args.json.write_text(json.dumps(report, separators=(",", ":")).replace('},{"op"', '},\n{"op"') + "\n")
    for line in failed:
        print(line, file=sys.stderr)
    print(f"{len(kernels)} launches of {len(cases)} cases: {f'{len(failed)} FAILURES' if failed else 'all pass'}")
    return 1 if failed else 0


def read(case: Case, passes: dict[str, list[Launch]], arch: int) -> list[dict[str, Any]]:
    """A row for each of the case's launches, with the reasons for which it does not pass the gate."""
    everything = [launch for listed in passes.values() for launch in listed]
    rows = []
    for direction, listed in passes.items():
        for launch in listed:
            row = {"op": case.op, "case": case.name, "pass": direction, "grid": launch.grid, "width": case.width}
            try:
                code = machine_code.read(launch, arch)
            except Exception as error:  # whatever the compiler says is a finding, and the other kernels are still read
                why = str(error).strip().splitlines() or [""]
                said = {"kernel": machine_code.name_of(launch), "arch": arch}
                rows.append(row | said | {"failures": [f"does not compile: {type(error).__name__}: {why[0]}"]})
                continue
            main_arguments = gate.main_arguments(launch, everything) - set(case.narrow)
            reasons = gate.failures(code, main_arguments, case.width, case.tensor_cores)
            rows.append(row | asdict(code) | {"main": sorted(main_arguments), "failures": reasons})
    return rows


if __name__ == "__main__":
    sys.exit(main())
