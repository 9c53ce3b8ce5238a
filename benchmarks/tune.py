"""`python -m benchmarks.tune --op OP ...`: which launch configurations are the fastest, when somebody asks.

For each case, each table of pdfast_kernels.runtime.configs that its launches ask is tried with other rows (`candidates`),
one table at a time. A row is compiled and must pass the gate of benchmarks.static (no spills, above all); its values must be
as near to float64 as the shipped row's; then it is timed, forward and backward, in a CUDA graph. Printed at the end are the
rows to put before the table's own. Without a GPU `--dry-run` compiles the candidates for an `--arch` and times nothing.
`--table` and `--rows` narrow what is tried: one table, and all rows of some values instead of the candidates.
"""

import argparse
import math
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks import static
from benchmarks.cases import add_choice_of_cases, chosen_cases
from benchmarks.command import Parser, Report, Row, header, seconds, trying
from benchmarks.static import launches
from benchmarks.timing import captured, measure, quantiles
from benchmarks.work import Case, fill, in_mode, largest_error
from pdfast_kernels import use
from pdfast_kernels.ops.attention import attention_kernels as attention
from pdfast_kernels.runtime.configs import UNBOUNDED, Lookup, looked_up
from pdfast_kernels.runtime.launch import Launch, arch_of, next_power_of_2
from pdfast_kernels.runtime.triton import INTERPRETED

Grid = dict[str, tuple[Any, ...]]

MOST_RESIDENT = 512  # positions

BLOCKS: Grid = {"block": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8, 16)}
GROUP_NORM: tuple[Grid, ...] = (
    {"resident": (1024, 2048, 4096, 8192, 16384), "most": (8192, 16384), "per_warp": (512, 1024, 2048)},
    {"most": (0,), "stream": (2048, 4096, 8192), "tiles": (4, 8, 16), "stages": (1, 2, 4), "stream_warps": (4, 8)},
)
GRIDS: dict[str, tuple[Grid, ...]] = {
    "diffuse": ({"block": (512, 1024, 2048), "tiles": (1, 2, 4), "num_warps": (2, 4, 8)},),
    **dict.fromkeys(("ddim_step", "ddim_step_weighted_loss", "adam_ema"), (BLOCKS,)),
    **dict.fromkeys(("group_norm forward", "group_norm backward"), GROUP_NORM),
}
DEVICE = torch.device("cuda")
FASTER = 0.98
"""Of the shipped row's time, which another must be below: less is noise."""
MOST_ERROR = 1.5
"""Times the shipped row's: sums in another order differ."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.tune", description="The fastest launch configurations, measured.")
    add_choice_of_cases(parser)
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates, and time nothing")
    parser.add_argument("--arch", type=int, choices=static.COMPILED_FOR, help="for --dry-run; 90 unless said")
    parser.add_argument("--seconds", type=seconds, default=0.05, metavar="S", help="for each candidate")
    parser.add_argument("--table", nargs="+", metavar="NAME", help="only these tables, such as 'attention backward'")
    said = "instead of the candidates: the shipped row with each combination of these values, such as block=64,128 "
    said += "num_warps=4. May be said more than once"
    parser.add_argument("--rows", nargs="+", action="append", type=_values, metavar="FIELD=VALUES", help=said)
    parser.add_json()
    options = parser.parse(arguments)
    if not (cases := chosen_cases(parser, options)):
        return 0
    arch = _arch(parser, options)
    lookups = _lookups(parser, options, cases, arch)
    start = "{case:<55} {table:<24} {row:<60} {registers} registers, {stack} bytes spilled, {shared} shared"
    report = Report(options.json, header(None if options.dry_run else DEVICE) | {"arch": arch}, start, "{said}")
    best: list[str] = []
    for case in cases:
        for lookup in lookups[case.full_name]:
            for row in _try(case, lookup, options, arch):
                report.add(row)
        best = replacements(report.rows)
        report.write(best=best)
    if not options.dry_run:
        print("\n".join(best) or "no row is faster than the shipped ones")
    return 0


def _values(text: str) -> tuple[str, tuple[Any, ...]]:
    """block=64,128 -> ("block", (64, 128)). Kernels, which only attention's tables have, are said by name."""
    field, _, values = text.partition("=")
    try:
        return field, tuple(getattr(attention, v) if field == "kernel" else int(v) for v in values.split(","))
    except (AttributeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: say FIELD=VALUES, such as block=64,128") from None


def _lookups(parser: Parser, options: Namespace, cases: list[Case], arch: int) -> dict[str, list[Lookup]]:
    """For each case's name what it asks of the tables that were named. An error if no case asks one, or for an unknown field."""
    lookups: dict[str, list[Lookup]] = {}
    tables: dict[str, tuple[str, ...]] = {}
    for case in cases:
        with looked_up() as asked:
            launches(partial(case.make, case.samples, "cpu"), arch)
        once = {(lookup.table.name, lookup.sizes): lookup for lookup in asked}.values()
        tables |= {lookup.table.name: lookup.row._fields for lookup in once}
        lookups[case.full_name] = [one for one in once if not options.table or one.table.name in options.table]
    if not any(lookups.values()):
        parser.error(f"no case asks these tables; asked are {', '.join(tables)}")
    for table in dict.fromkeys(one.table.name for of_case in lookups.values() for one in of_case):
        for field in (field for grid in options.rows or () for field, _ in grid):
            if field not in tables[table]:
                parser.error(f"{table} has no field {field}, but {', '.join(tables[table])}")
    return lookups


def _arch(parser: Parser, options: Namespace) -> int:
    if INTERPRETED:
        parser.error(static.REFUSED)
    if options.dry_run:
        return options.arch or 90
    if options.arch:
        parser.error("--arch is for --dry-run: what is timed is this machine's GPU")
    if not torch.cuda.is_available():
        parser.error("there is no GPU to time on; --dry-run compiles the candidates without one")
    if (arch := arch_of(DEVICE)) not in static.COMPILED_FOR:
        parser.error(f"this GPU is an sm_{arch}; the gate knows {', '.join(map(str, static.COMPILED_FOR))}")
    return arch


def candidates(lookup: Lookup, grids: Sequence[Grid] = ()) -> list[tuple]:
    """The shipped row first. All are for launches of at most the lookup's sizes."""
    sizes = dict(zip(lookup.row._fields, lookup.sizes, strict=False))
    grids = grids or GRIDS.get(lookup.table.name) or tuple(_attention(lookup))
    rows = [lookup.row._replace(**sizes)]
    for grid in grids:
        rows += [rows[0]._replace(**dict(zip(grid, values, strict=True))) for values in product(*grid.values())]
    return list(dict.fromkeys(rows))


def _attention(lookup: Lookup) -> Iterator[Grid]:
    """Where all positions fit on chip also the kernels that hold them."""
    fp32 = lookup.table.name.endswith("fp32")
    backward, rows = "backward" in lookup.table.name, max(next_power_of_2(lookup.sizes[0]), 16)
    blocks, steps = ((16, 32, 64), (16, 32)) if fp32 else ((64, 128), (32, 64, 128))
    common = {"num_warps": (4, 8), "num_stages": (1,) if fp32 else (2, 3), "queries": (0,)}
    stream = attention.backward_stream if backward else attention.forward_stream
    queries = {"queries": (0, 128)} if backward and not fp32 else {}
    yield {"kernel": (stream,), "block": blocks, "step": steps, **common, **queries}
    if rows > MOST_RESIDENT:
        return
    if not backward:
        yield {"kernel": (attention.forward_resident,), "block": blocks, "step": (rows,), **common}
        return
    one = {**common, "num_stages": (1,)}
    yield {"kernel": (attention.backward_tile,), "block": (rows,), "step": (rows,), **one}
    yield {"kernel": (attention.backward_resident,), "block": (rows,), "step": steps, **common}


def _try(case: Case, lookup: Lookup, options: Namespace, arch: int) -> Iterator[Row]:
    """Of each row that launches something else than those before: how it fared, or why it was rejected."""
    seen: list[list[Launch]] = []
    shipped = None
    for row in candidates(lookup, [dict(grid) for grid in options.rows or ()]):
        with lookup.table.overridden(row):
            passes = launches(partial(case.make, case.samples, "cpu"), arch)
            if (launched := _constants(passes)) in seen:
                continue
            seen.append(launched)
            tried: Row = {"table": lookup.table.name, "arch": arch, "sizes": lookup.sizes, "case": case.full_name}
            tried |= {"row": formatted(row), "shipped": shipped is None}
            read = static.read(case, passes, arch)
            for what in ("registers", "stack", "shared"):
                tried[what] = max((of[what] for of in read if what in of), default=None)
            tried["rejected"] = next((f"{of['kernel']}: {why}" for of in read for why in of["failures"]), None)
            if not options.dry_run and not tried["rejected"]:
                tried |= _timed(case, options, shipped)
        shipped = shipped or tried
        said = "{median_ms:.4f} ms, error {error:.1e}".format(**tried) if "median_ms" in tried else ""
        said += " (shipped)" if tried["shipped"] else ""
        yield tried | {"said": said + (f" REJECTED: {tried['rejected']}" if tried["rejected"] else "")}


def _constants(passes: dict[str, list[Launch]]) -> list[Launch]:
    """What tells one way to launch a case from another: all but its tensors."""
    every = [launch for listed in passes.values() for launch in listed]
    plain = ({k: v for k, v in one.arguments.items() if not isinstance(v, torch.Tensor)} for one in every)
    return [replace(one, arguments=arguments) for one, arguments in zip(every, plain, strict=True)]


def _timed(case: Case, options: Namespace, shipped: Row | None) -> Row:
    row: Row = {}
    with trying(row), use("triton"):
        work = case.make(case.samples, DEVICE.type)
        fill(work)
        mode = "full" if work.differentiated else "fwd"
        row["error"] = error = largest_error(work.kernels, work, mode)
        most = MOST_ERROR * shipped["error"] if shipped and "error" in shipped else math.inf
        if not error <= most:
            return row | {"rejected": f"its error is {error:.1e}, more than {most:.1e}"}
        row |= quantiles(measure(captured(in_mode(work.kernels, work, mode)), DEVICE, options.seconds))
    return row | ({"rejected": row.pop("unavailable")} if "unavailable" in row else {})


def replacements(tried: list[Row]) -> list[str]:
    """For each table and size the row that is fastest over all cases that asked for it, unless that is the shipped one."""
    times: dict[Any, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in tried:
        key = one["table"], one["arch"], tuple(one["sizes"])
        times[key]["shipped" if one["shipped"] else one["row"]][one["case"]] = one.get("median_ms", math.inf)
    lines = []
    for (table, arch, _), rows in sorted(times.items()):
        shipped = {case: time for case, time in rows.pop("shipped").items() if time < math.inf}
        ratios = {
            geometric_mean(own.get(case, math.inf) / time for case, time in shipped.items()): row
            for row, own in rows.items()
            if shipped  # else there is nothing to be faster than
        }
        if (ratio := min(ratios, default=1)) < FASTER:
            lines.append(f"{table}, sm_{arch}: {ratios[ratio]},  # {ratio:.0%} of the shipped row's time")
    return lines


def formatted(row: tuple) -> str:
    """As it would stand in a table."""
    values = (getattr(value, "__name__", "UNBOUNDED" if value == UNBOUNDED else repr(value)) for value in row)
    return f"{type(row).__name__}({', '.join(values)})"


if __name__ == "__main__":
    sys.exit(main())
