"""What the commands here have in common: errors of one line, and the arguments that choose cases."""

import argparse
import fnmatch
from pathlib import Path
from typing import NoReturn

from benchmarks.cases import DTYPES, NETWORKS, Case, all_cases
from benchmarks.shapes import cases_at

SMALL_BATCH = "small-batch"


class Parser(argparse.ArgumentParser):
    """Exit code 2 and one line for a bad argument."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def check_writable(self, *files: Path | None) -> None:
        """An error now, not after the measurements."""
        for file in files:
            if file and (file.is_dir() or not file.parent.is_dir()):
                self.error(f"{file} is no file that could be written")


def add_choice_of_cases(parser: Parser) -> None:
    ops = list(dict.fromkeys(case.op for case in all_cases()))
    parser.add_argument("--op", nargs="+", choices=[*ops, "all"], default=["all"], help="in this order")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="of the names that --list prints")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"of these networks ({', '.join(NETWORKS)}, {SMALL_BATCH}), or N,C,H,W: images of that shape, and attention "
        "over their H*W positions. adam_ema has none and is not chosen by it",
    )
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="of the attention at N,C,H,W: C/D heads")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="all unless said")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each operation")
    parser.add_argument("--samples", type=int, metavar="N", help="another batch size than the case's")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and nothing else")


def chosen_cases(parser: Parser, options: argparse.Namespace) -> list[Case]:
    """An error where there are none."""
    if options.head_dim < 1 or (options.samples is not None and options.samples < 1):
        parser.error("--head-dim and --samples are at least 1")
    presets, cases = None, all_cases()
    if options.shapes:
        presets = [shape for shape in options.shapes if shape in (*NETWORKS, SMALL_BATCH)]
        for shape in options.shapes:
            if shape not in presets:
                cases += cases_at(_four_numbers(parser, shape), options.head_dim)
    cases = [case for case in cases if _is_chosen(case, presets, options)]
    if not cases:
        parser.error("no such cases; --list names them")
    return cases if "all" in options.op else sorted(cases, key=lambda case: options.op.index(case.op))


def _is_chosen(case: Case, presets: list[str] | None, options: argparse.Namespace) -> bool:
    return (
        ("all" in options.op or case.op in options.op)
        and any(fnmatch.fnmatch(case.full_name, pattern) for pattern in options.case)
        and (not options.dtype or any(dtype in case.name for dtype in options.dtype))
        and (case.quick or not options.quick)
        and (presets is None or case.explicit or case.op == "adam_ema" or _is_of(case, presets))
    )


def _is_of(case: Case, presets: list[str]) -> bool:
    return any(case.name.startswith(f"{preset.replace('-', ' ')} ") for preset in presets)


def _four_numbers(parser: Parser, text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        parser.error(f"--shapes {text}: say {', '.join(NETWORKS)}, {SMALL_BATCH} or N,C,H,W, such as 128,256,16,16")
    return tuple(map(int, parts))
