"""`python -m benchmarks.kernels`: how long the operations take, next to what else does the same.

A row is a case (an operation at a shape: `--list`), a provider, a mode, and whether a CUDA graph of the call was timed or
the call itself. `GB/s` counts the bytes that must move, each tensor once; `of copy` compares with a copy's bandwidth,
measured in the same run; `TFLOP/s` is of the matrix products, `of matmul` of a large one, in bf16 or fp32, whichever is
faster; `error` is the largest difference from plain PyTorch in float64, of the largest value: of the result (fwd), the
gradients (bwd) or both (full).
"""

import csv
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import accuracy, plots, traffic
from benchmarks.arguments import Parser, add_choice_of_cases, chosen_cases
from benchmarks.cases import Case
from benchmarks.header import header
from benchmarks.providers import NAMES, Call, Unavailable, call_of, fallback
from benchmarks.timing import Timing, captured, ceilings, measure
from benchmarks.work import Work
from pdfast_kernels import dispatch

MODES = ("fwd", "bwd", "full")
GRAPHS = {"off": (False,), "on": (True,), "both": (False, True)}

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = chosen_cases(parser, options)
    if options.list:
        print("\n".join(case.full_name for case in cases))
        return 0
    _check(parser, options)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU: say --device cpu")
    try:
        kernels = "Triton" if dispatch.triton_runs("pdfast", device, None) else "plain PyTorch"
    except ValueError as reason:
        parser.error(f"{reason}")
    said = header(device) | {"pdfast runs": kernels} | ceilings(device, options.seconds)
    print(", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in said.items()))
    rows = []
    for case in cases:
        for mode in options.mode:
            for provider in NAMES if "all" in options.providers else options.providers:
                row = {"op": case.op, "case": case.name, "provider": provider, "mode": mode}
                rows += [row | measured for measured in _measured(case, provider, mode, device, options, said)]
                for measured in rows[-len(GRAPHS[options.graph]) :]:
                    _print(measured)
        _write(options, said, rows)  # after each case: nothing is lost
    if options.plot:
        plots.write(options.plot, said, rows)
    return 0


def _parser() -> Parser:
    parser = Parser("benchmarks.kernels", description="Times of the operations, next to others'.")
    add_choice_of_cases(parser)
    parser.add_argument("--providers", nargs="+", choices=[*NAMES, "all"], default=["pdfast", "eager", "compile"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["fwd"])
    parser.add_argument(
        "--graph", choices=GRAPHS, default="off", help="time CUDA graphs of the calls, the calls, or both"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for each row")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure, .png or .svg: needs matplotlib")
    return parser


def _check(parser: Parser, options: Any) -> None:
    parser.check_writable(options.json, options.csv, options.plot)
    if options.plot and options.plot.suffix not in plots.FORMATS:
        parser.error(f"--plot {options.plot}: its name must end in {' or '.join(plots.FORMATS)}")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib, which is not installed")


def _measured(
    case: Case, provider: str, mode: str, device: torch.device, options: Namespace, ceiling: Row
) -> list[Row]:
    """A row without CUDA graph, with one, or both."""
    graphs, samples = GRAPHS[options.graph], options.samples or case.samples
    try:
        work = case.make(samples, device.type)
        fill(work)
        if mode != "fwd" and not work.differentiated:
            raise Unavailable("has no backward")
        forward = call_of(provider, case, work)
        said = fallback(forward)
        call = call_in_mode(forward, work, mode)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        call()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else None
        comparable = provider == "pdfast" or work.same_numbers is None
        row = {
            "peak_mib": peak,
            "error": accuracy.error(forward, work, mode) if comparable else None,
            "fell_back": said,
        }
        moved, products = _must(case, samples, mode)
    except Exception as failure:  # of another provider, of whatever kind: its row says so
        return [{"graph": graph, "unavailable": _reason(failure)} for graph in graphs]
    rows = []
    for graph in graphs:
        try:
            if graph:
                _can_be_captured(mode, device)
            timing = measure(captured(call) if graph else call, device, options.seconds)
            rows.append({"graph": graph} | _rates(timing, moved, products, ceiling) | row)
        except Exception as failure:
            rows.append({"graph": graph, "unavailable": _reason(failure)})
    return rows


def _can_be_captured(mode: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    if mode == "bwd":
        raise Unavailable("a backward by itself runs on its forward's stream, which is not captured: say --mode full")


def _rates(timing: Timing, moved: int, products: int, ceiling: Row) -> Row:
    rate, matrix_rate = moved / timing.median / 1e6, products / timing.median / 1e9
    return {
        "median_ms": timing.median,
        "p20_ms": timing.p20,
        "p80_ms": timing.p80,
        "calls": timing.calls,
        "must_move_mb": moved / 1e6,
        "gb_s": rate,
        "of_copy": rate / ceiling["copy_gb_s"],
        "tflop_s": matrix_rate,
        "of_matmul": matrix_rate / ceiling["matmul_tflop_s"],
    }


def _reason(failure: Exception) -> str:
    if isinstance(failure, Unavailable):
        return str(failure)
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:200]}"


def fill(work: Work) -> None:
    """With numbers: zeros cost less power than what a user has. Matrices such that products are of about 1."""
    generator = torch.Generator(work.reads[0].device).manual_seed(0)
    for tensor in {id(t): t.data for t in [*work.reads, *work.differentiated]}.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if tensor.dim() == 2:
                tensor.div_(tensor.shape[1] ** 0.5)
            if work.writes:  # an optimizer's second moments are not negative
                tensor.abs_()


def call_in_mode(forward: Call, work: Work, mode: str) -> Call:
    """What is timed."""
    if mode == "fwd":
        return torch.no_grad()(forward)
    result = forward()
    gradient = torch.ones_like(result)
    if mode == "bwd":
        reached = _reached(result, work)
        return lambda: torch.autograd.grad(result, reached, gradient, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(forward(), work.differentiated, gradient, allow_unused=True)


def _reached(result: Tensor, work: Work) -> list[Tensor]:
    if result.grad_fn is None:
        raise Unavailable("its result has no gradient")
    return work.differentiated


def _must(case: Case, samples: int, mode: str) -> tuple[int, int]:
    """Bytes that must move, and the floating-point operations of the matrix products."""
    bytes_moved, _ = traffic.must_and_eager(case.make(samples, "meta"))
    keys = {"fwd": ["forward"], "bwd": ["backward"], "full": ["forward", "backward"]}[mode]
    work = case.make(samples, "meta")
    attention = mock.patch.object(F, "scaled_dot_product_attention", traffic.flash_attention)
    with FlopCounterMode(display=False) as counter, attention:
        result = work.plain() if case.op != "adam_ema" else None
        forward = counter.get_total_flops()
        if mode != "fwd":
            work.gradients(result, torch.empty_like(result))
    total = counter.get_total_flops()
    return sum(bytes_moved[key] for key in keys), {"fwd": forward, "bwd": total - forward, "full": total}[mode]


def _print(row: Row) -> None:
    start = (
        f"{row['op']:<24} {row['case']:<40} {row['provider']:<9} {row['mode']:<4} {'graph' if row['graph'] else '':<5}"
    )
    if "unavailable" in row:
        print(f"{start} unavailable: {row['unavailable']}", flush=True)
        return
    numbers = f"{row['median_ms']:9.4f} ms ({row['p20_ms']:.4f} .. {row['p80_ms']:.4f})"
    numbers += f" {row['gb_s']:8.1f} GB/s {row['of_copy']:6.1%} of copy"
    more = f" {row['tflop_s']:7.2f} TFLOP/s {row['of_matmul']:6.1%} of matmul" if row["tflop_s"] else ""
    more += f" error {row['error']:.1e}" if row["error"] is not None else ""
    print(f"{start}{numbers}{more}{'  FELL BACK: ' + row['fell_back'] if row['fell_back'] else ''}", flush=True)


def _write(options: Namespace, said: Row, rows: list[Row]) -> None:
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.json.write_text(f'{{"header": {json.dumps(said)}, "rows": [\n{lines}\n]}}\n')
    if options.csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
