"""`python -m benchmarks.kernels`: how long the operations take, next to what else does the same.

A row is a case (an operation at a shape: `--list`), a provider and a mode. `GB/s` counts the bytes that must move, each
tensor once; `of copy` compares with a copy's bandwidth, measured in the same run; `TFLOP/s` is of the matrix products;
`error` is the largest difference from plain PyTorch in float64, of the largest value.
"""

import argparse
import csv
import fnmatch
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import traffic
from benchmarks.cases import Case, all_cases
from benchmarks.providers import NAMES, Unavailable, call_of, fallback
from benchmarks.timing import captured, ceilings, measure
from benchmarks.work import Work
from pdfast_kernels._triton import triton

MODES = ("fwd", "bwd", "full")
RANDOM_NOISE = ("diffuse", "adam_ema")  # plain PyTorch draws other noise; each call changes the state


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    cases = [case for case in all_cases() if _wanted(case, options)]
    if not cases:
        print("benchmarks.kernels: error: no such cases; --list names them", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.full_name for case in cases))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.kernels: error: --device cuda, but there is no GPU: say --device cpu", file=sys.stderr)
        return 2
    header = _header(device) | ceilings(device, options.seconds)
    print(", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in header.items()))
    rows = []
    for case in cases:
        for mode in options.mode:
            for provider in options.providers:
                row = {"op": case.op, "case": case.name, "provider": provider, "mode": mode}
                row |= _measured(case, provider, mode, device, options, header)
                rows.append(row)
                _print(row)
        _write(options, header, rows)  # after each case: nothing is lost
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.kernels", description="Times of the operations, next to others'.")
    ops = sorted({case.op for case in all_cases()})
    parser.add_argument("--op", nargs="+", choices=[*ops, "all"], default=["all"])
    parser.add_argument("--case", nargs="+", default=["*"], help="patterns of the names that --list prints")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp16", "fp32"], help="all unless said")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each operation")
    parser.add_argument("--providers", nargs="+", choices=NAMES, default=["pdfast", "eager", "compile"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["fwd"])
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs of the calls")
    parser.add_argument("--samples", type=int, help="another batch size than the case's")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each row")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(arguments)


def _wanted(case: Case, options: argparse.Namespace) -> bool:
    return (
        ("all" in options.op or case.op in options.op)
        and any(fnmatch.fnmatch(case.full_name, pattern) for pattern in options.case)
        and (not options.dtype or any(dtype in case.name for dtype in options.dtype))
        and (case.quick or not options.quick)
    )


def _header(device: torch.device) -> dict[str, Any]:
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = described.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    version = triton.__version__ if triton else "none"
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__, "triton": version, "commit": commit}


def _measured(
    case: Case, provider: str, mode: str, device: torch.device, options: argparse.Namespace, ceiling: dict[str, Any]
) -> dict[str, Any]:
    samples = options.samples or case.samples
    try:
        work = case.make(samples, device.type)
        _fill(work)
        if mode != "fwd" and not work.differentiated:
            raise Unavailable("has no backward")
        forward = call_of(provider, case, work)
        said = fallback(forward)
        call = _call(forward, work, mode)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        call()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else None
        error = None if case.op in RANDOM_NOISE else _error(forward, work)
        timing = measure(captured(call) if options.graph and device.type == "cuda" else call, device, options.seconds)
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as failure:  # of another provider, of whatever kind: its row says so
        first = (str(failure).strip().splitlines() or [""])[0]
        return {"unavailable": f"{type(failure).__name__}: {first[:200]}"}
    moved, products = _must(case, samples, mode)
    rate = moved / timing.median / 1e6
    return {
        "median_ms": timing.median,
        "p20_ms": timing.p20,
        "p80_ms": timing.p80,
        "calls": timing.calls,
        "graph": options.graph and device.type == "cuda",
        "must_move_mb": moved / 1e6,
        "gb_s": rate,
        "of_copy": rate / ceiling["copy_gb_s"],
        "tflop_s": products / timing.median / 1e9,
        "peak_mib": peak,
        "error": error,
        "fell_back": said,
    }


def _fill(work: Work) -> None:
    """With numbers: zeros cost less power than what a user has. Matrices such that products are of about 1."""
    generator = torch.Generator(work.reads[0].device).manual_seed(0)
    for tensor in {id(t): t.data for t in [*work.reads, *work.differentiated]}.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if tensor.dim() == 2:
                tensor.div_(tensor.shape[1] ** 0.5)
            if work.writes:  # an optimizer's second moments are not negative
                tensor.abs_()


def _call(forward, work: Work, mode: str):
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


@torch.no_grad()
def _error(forward, work: Work) -> float:
    """The plain result of the same numbers in float64 is what it is compared with."""
    ours = forward()
    tensors = [t for t in {id(t): t for t in [*work.reads, *work.differentiated]}.values() if t.is_floating_point()]
    before = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        exact = work.plain()
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
    ours, exact = (r[0] if isinstance(r, tuple) else r for r in (ours, exact))
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max())


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


def _print(row: dict[str, Any]) -> None:
    start = f"{row['op']:<24} {row['case']:<40} {row['provider']:<9} {row['mode']:<4}"
    if "unavailable" in row:
        print(f"{start} unavailable: {row['unavailable']}", flush=True)
        return
    numbers = f"{row['median_ms']:9.4f} ms ({row['p20_ms']:.4f} .. {row['p80_ms']:.4f})"
    numbers += f" {row['gb_s']:8.1f} GB/s {row['of_copy']:6.1%} of copy"
    more = f" {row['tflop_s']:7.2f} TFLOP/s" if row["tflop_s"] else ""
    more += f" error {row['error']:.1e}" if row["error"] is not None else ""
    print(f"{start}{numbers}{more}{'  FELL BACK: ' + row['fell_back'] if row['fell_back'] else ''}", flush=True)


def _write(options: argparse.Namespace, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if options.json:
        options.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    if options.csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
