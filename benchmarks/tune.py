"""`python -m benchmarks.tune --op OP ...`: which launch configurations are the fastest, when somebody asks.

For each case, each table of pdfast_kernels.configs that its launches ask is tried with other rows (benchmarks.candidates),
one table at a time. A row is compiled and must pass the gate of benchmarks.static (no spills, above all); its values must be
as near to float64 as the shipped row's; then it is timed, forward and backward, in a CUDA graph. Printed at the end are the
rows to put before the table's own. Without a GPU `--dry-run` compiles the candidates for an `--arch` and times nothing.
"""

import json
import math
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, gate, static
from benchmarks.arguments import Parser, add_choice_of_cases, chosen_cases
from benchmarks.candidates import candidates
from benchmarks.cases import Case
from benchmarks.header import header
from benchmarks.kernels import call_in_mode, fill
from benchmarks.timing import captured, measure
from benchmarks.work import launches
from pdfast_kernels import use
from pdfast_kernels._triton import INTERPRETED
from pdfast_kernels.configs import UNBOUNDED, Lookup, Row, looked_up
from pdfast_kernels.launch import Launch, arch_of

Tried = dict[str, Any]

DEVICE = "cuda"
FASTER = 0.98
"""Of the shipped row's time, which another must be below: less is noise."""
MOST_ERROR = 1.5
"""Times the shipped row's: sums in another order differ."""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = chosen_cases(parser, options)
    if options.list:
        print("\n".join(case.full_name for case in cases))
        return 0
    arch = _arch(parser, options)
    tried: list[Tried] = []
    for case in cases:
        for lookup in _asked(case, options, arch):
            tried += _try(case, lookup, options, arch)
        rows = replacements(tried)
        if options.json:  # after each case: nothing is lost
            said = header(None if options.dry_run else torch.device(DEVICE)) | {"arch": arch}
            options.json.write_text(json.dumps({"header": said, "tried": tried, "rows": rows}, indent=1) + "\n")
    if not options.dry_run:
        print("\n".join(rows) or "no row is faster than the shipped ones")
    return 0


def _parser() -> Parser:
    parser = Parser("benchmarks.tune", description="The fastest launch configurations, measured.")
    add_choice_of_cases(parser)
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates, and time nothing")
    parser.add_argument("--arch", type=int, choices=tuple(gate.SHARED_MEMORY), help="for --dry-run; 90 unless said")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each candidate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every candidate, and why it was rejected")
    return parser


def _arch(parser: Parser, options: Namespace) -> int:
    parser.check_writable(options.json)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and Triton would interpret the kernels, not compile them: unset it")
    if options.dry_run:
        return options.arch or 90
    if options.arch:
        parser.error("--arch is for --dry-run: what is timed is this machine's GPU")
    if not torch.cuda.is_available():
        parser.error("there is no GPU to time on; --dry-run compiles the candidates without one")
    arch = arch_of(torch.device(DEVICE))
    if arch not in gate.SHARED_MEMORY:
        parser.error(f"this GPU is an sm_{arch}; the gate knows {', '.join(map(str, gate.SHARED_MEMORY))}")
    return arch


def _asked(case: Case, options: Namespace, arch: int) -> list[Lookup]:
    with looked_up() as asked:
        launches(partial(case.make, options.samples or case.samples, "cpu"), arch)
    return list({(lookup.table.name, lookup.sizes): lookup for lookup in asked}.values())


def _try(case: Case, lookup: Lookup, options: Namespace, arch: int) -> Iterator[Tried]:
    """Of each row that launches something else than those before: how it fared, or why it was rejected."""
    seen, shipped = set(), None
    for row in candidates(lookup):
        with lookup.table.overridden(row):
            passes = launches(partial(case.make, options.samples or case.samples, "cpu"), arch)
            if (launched := _constants(passes)) in seen:
                continue
            seen.add(launched)
            tried = {"table": lookup.table.name, "arch": arch, "sizes": lookup.sizes, "case": case.full_name}
            tried |= {"row": formatted(row), "shipped": shipped is None, **_compiled(case, passes, arch)}
            if not options.dry_run and not tried["rejected"]:
                tried |= _timed(case, options, shipped)
        shipped = shipped or tried
        _print(tried)
        yield tried


def _constants(passes: dict[str, list[Launch]]) -> str:
    """What tells one way to launch a case from another."""
    return repr(
        [
            (launch.kernel.__name__, launch.grid, launch.num_warps, launch.num_stages, _plain(launch.arguments))
            for listed in passes.values()
            for launch in listed
        ]
    )


def _plain(arguments: Tried) -> Tried:
    return {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}


def _compiled(case: Case, passes: dict[str, list[Launch]], arch: int) -> Tried:
    read = static.read(case, passes, arch)
    worst = {
        key: max((row[key] for row in read if key in row), default=None) for key in ("registers", "stack", "shared")
    }
    reasons = (f"{row['kernel']}: {reason}" for row in read for reason in row["failures"])
    return {**worst, "rejected": next(reasons, None)}


def _timed(case: Case, options: Namespace, shipped: Tried | None) -> Tried:
    try:
        with use("triton"):
            work = case.make(options.samples or case.samples, DEVICE)
            fill(work)
            mode = "full" if work.differentiated else "fwd"
            error = accuracy.error(work.kernels, work, mode)
            most = MOST_ERROR * shipped["error"] if shipped and "error" in shipped else math.inf
            if not error <= most:
                return {"error": error, "rejected": f"its error is {error:.1e}, more than {most:.1e}"}
            timing = measure(captured(call_in_mode(work.kernels, work, mode)), torch.device(DEVICE), options.seconds)
    except Exception as failure:  # of whatever a candidate asks too much of: the others are still tried
        return {"rejected": f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:200]}"}
    return {"error": error, "median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}


def replacements(tried: list[Tried]) -> list[str]:
    """For each table and size the row that is fastest over all cases that asked for it, unless that is the shipped one."""
    times: dict[Any, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in tried:
        key = one["table"], one["arch"], tuple(one["sizes"])
        times[key]["shipped" if one["shipped"] else one["row"]][one["case"]] = one.get("median_ms", math.inf)
    lines = []
    for (table, arch, _), rows in sorted(times.items()):
        shipped = {case: time for case, time in rows.pop("shipped").items() if time < math.inf}
        ratios = {
            row: _mean(own.get(case, math.inf) / time for case, time in shipped.items()) for row, own in rows.items()
        }
        row, ratio = min(ratios.items(), key=lambda item: item[1], default=("", math.inf))
        if ratio < FASTER:
            lines.append(f"{table}, sm_{arch}: {row},  # {ratio:.0%} of the shipped row's time")
    return lines


def _mean(ratios: Iterator[float]) -> float:
    """Of ratios: geometric. Of none: infinity, there is nothing to be faster than."""
    listed = list(ratios)
    return math.prod(listed) ** (1 / len(listed)) if listed else math.inf


def formatted(row: Row) -> str:
    """As it would stand in a table."""
    values = (getattr(value, "__name__", "UNBOUNDED" if value == UNBOUNDED else repr(value)) for value in row)
    return f"{type(row).__name__}({', '.join(values)})"


def _print(tried: Tried) -> None:
    start = f"{tried['case']:<55} {tried['table']:<24} {tried['row']:<60}"
    numbers = f"{tried['registers']} registers, {tried['stack']} bytes spilled, {tried['shared']} shared"
    end = "" if "median_ms" not in tried else f", {tried['median_ms']:.4f} ms, error {tried['error']:.1e}"
    end += " (shipped)" if tried["shipped"] else ""
    end += f" REJECTED: {tried['rejected']}" if tried["rejected"] else ""
    print(f"{start} {numbers}{end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
