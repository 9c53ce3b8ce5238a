"""`python -m benchmarks.kernels`: how long the operations take, next to what else does the same.

A row is a case (an operation at a shape: `--list`), a provider, a mode, and whether a CUDA graph of the call was timed or
the call itself. `GB/s` counts the bytes that must move, each tensor once; `of copy` compares with a copy's bandwidth,
measured in the same run; `TFLOP/s` is of the matrix products, `of matmul` of a large one, in bf16 or fp32, whichever is
faster; `error` is the largest difference from plain PyTorch in float64, of the largest value: of the result (fwd), the
gradients (bwd) or both (full).
"""

import sys
from argparse import Namespace
from pathlib import Path

from benchmarks import accuracy
from benchmarks.cases import add_choice_of_cases, chosen_cases
from benchmarks.command import Parser, Report, Row, Unavailable, header, reason
from benchmarks.providers import NAMES, call_of, fallback
from benchmarks.timing import captured, ceilings, measure, quantiles
from benchmarks.work import Case, fill, in_mode, must_move
from pdfast_kernels.runtime import dispatch

PASSES = {"fwd": ["forward"], "bwd": ["backward"], "full": ["forward", "backward"]}
GRAPHS = {"off": (False,), "on": (True,), "both": (False, True)}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.kernels", description="Times of the operations, next to others'.")
    add_choice_of_cases(parser)
    parser.add_argument("--providers", nargs="+", choices=[*NAMES, "all"], default=["pdfast", "eager", "compile"])
    parser.add_argument("--mode", nargs="+", choices=PASSES, default=["fwd"])
    parser.add_argument("--graph", choices=GRAPHS, default="off", help="CUDA graphs of the calls, the calls, or both")
    parser.add_measuring(0.2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse(arguments)
    cases = chosen_cases(parser, options)
    if options.list:
        print("\n".join(case.full_name for case in cases))
        return 0
    try:
        kernels = "Triton" if dispatch.triton_runs("pdfast", options.device, None) else "plain PyTorch"
    except ValueError as error:
        parser.error(f"{error}")
    said = header(options.device) | {"pdfast runs": kernels} | ceilings(options.device, options.seconds)
    start = "{op:<24} {case:<40} {provider:<9} {mode:<4} graph {graph!s:<5}"
    numbers = "{median_ms:9.4f} ms ({p20_ms:.4f} .. {p80_ms:.4f}) {gb_s:8.1f} GB/s {of_copy:6.1%} of copy "
    numbers += "{tflop_s:7.2f} TFLOP/s {of_matmul:6.1%} of matmul error {error:.1e}"
    report = Report(options.json, said, start, numbers)
    for case in cases:
        for mode in options.mode:
            for provider in NAMES if "all" in options.providers else options.providers:
                row = {"op": case.op, "case": case.name, "provider": provider, "mode": mode}
                for measured in _measured(case, provider, mode, options, said):
                    report.add(row | measured)
    return 0


def _measured(case: Case, provider: str, mode: str, options: Namespace, ceiling: Row) -> list[Row]:
    """A row without CUDA graph, with one, or both."""
    graphs, samples, device = GRAPHS[options.graph], case.samples, options.device
    try:
        work = case.make(samples, device.type)
        fill(work)
        if mode != "fwd" and not work.differentiated:
            raise Unavailable("has no backward")
        forward = call_of(provider, case, work)
        said = {"fell_back": fallback(forward)}
        call = in_mode(forward, work, mode)
        comparable = provider == "pdfast" or work.same_numbers is None
        said["error"] = accuracy.error(forward, work, mode) if comparable else None
        must = must_move(case.make(samples, "meta"))
        moved, products = (sum(must[name][i] for name in PASSES[mode]) for i in (0, 1))
    except Exception as failure:  # of another provider, of whatever kind: its row says so
        return [{"graph": graph, "unavailable": reason(failure)} for graph in graphs]
    rows: list[Row] = []
    for graph in graphs:
        try:
            if graph and device.type != "cuda":
                raise Unavailable("CUDA graphs need a GPU")
            if graph and mode == "bwd":
                raise Unavailable(
                    "a backward by itself runs on its forward's stream, which is not captured: say --mode full"
                )
            times = quantiles(measure(captured(call) if graph else call, device, options.seconds))
            rate, flops = moved / times["median_ms"] / 1e6, products / times["median_ms"] / 1e9
            rates = {"must_move_mb": moved / 1e6, "gb_s": rate, "of_copy": rate / ceiling["copy_gb_s"]}
            rates |= {"tflop_s": flops, "of_matmul": flops / ceiling["matmul_tflop_s"]}
            rows.append({"graph": graph, **times, **rates, **said})
        except Exception as failure:
            rows.append({"graph": graph, "unavailable": reason(failure)})
    return rows


if __name__ == "__main__":
    sys.exit(main())
