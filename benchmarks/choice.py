"""The arguments that choose cases."""

import argparse
import fnmatch
from dataclasses import replace

from benchmarks.cases import NETWORKS, SMALL_BATCH, all_cases, cases_at
from benchmarks.command import Parser, count
from benchmarks.operations import DTYPES
from benchmarks.work import Case

PRESETS = {name.replace(" ", "-"): name for name in (*NETWORKS, SMALL_BATCH)}


def shape(text: str) -> str | tuple[int, ...]:
    """A network's name, or N,C,H,W."""
    if text in PRESETS:
        return PRESETS[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: say {', '.join(PRESETS)} or N,C,H,W, such as 128,256,16,16")
    return tuple(map(int, parts))


def add_choice_of_cases(parser: Parser) -> None:
    ops = list(dict.fromkeys(case.op for case in all_cases()))
    parser.add_argument("--op", nargs="+", choices=[*ops, "all"], default=["all"], help="in this order")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="of the names that --list prints")
    said = f"of these networks ({', '.join(PRESETS)}), or N,C,H,W: images of that shape, and attention over their H*W "
    said += "positions. adam_ema has none and is not chosen by it"
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="SHAPE", help=said)
    parser.add_argument(
        "--head-dim", type=count, default=64, metavar="D", help="of the attention at N,C,H,W: C/D heads"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="all unless said")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each operation")
    parser.add_argument("--samples", type=count, metavar="N", help="another batch size than the case's")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and nothing else")


def chosen_cases(parser: Parser, options: argparse.Namespace) -> list[Case]:
    """An error where there are none."""
    cases, shapes = all_cases(), options.shapes or []
    for named in shapes:
        if not isinstance(named, str):
            cases += cases_at(named, options.head_dim)
    cases = [
        replace(case, samples=options.samples or case.samples)
        for case in cases
        if ("all" in options.op or case.op in options.op)
        and any(fnmatch.fnmatch(case.full_name, pattern) for pattern in options.case)
        and (not options.dtype or any(dtype in case.name for dtype in options.dtype))
        and (case.quick or not options.quick)
        and (not shapes or case.network in (*shapes, ""))
    ]
    if not cases:
        parser.error("no such cases; --list names them")
    return cases if "all" in options.op else sorted(cases, key=lambda case: options.op.index(case.op))
