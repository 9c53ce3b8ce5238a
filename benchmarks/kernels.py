"""`python -m benchmarks.kernels`: how long the operations take, next to what else does the same.

A row is a case (an operation at a shape: `--list`), a provider, a mode, and whether a CUDA graph of the call was timed or
the call itself. `GB/s` counts the bytes that must move, each tensor once; `of copy` compares with a copy's bandwidth,
measured in the same run; `TFLOP/s` is of the matrix products, `of matmul` of a large one, in bf16 or fp32, whichever is
faster; `error` is the largest difference from plain PyTorch in float64, of the largest value: of the result (fwd), the
gradients (bwd) or both (full).
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from math import gcd
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import EPS, GROUPS, add_choice_of_cases, chosen_cases
from benchmarks.command import Parser, Report, Row, Unavailable, header, trying
from benchmarks.timing import captured, ceilings, measure, quantiles
from benchmarks.work import Case, Work, fill, in_mode, largest_error, must_move
from pdfast_kernels.runtime import dispatch

PASSES = {"fwd": ["forward"], "bwd": ["backward"], "full": ["forward", "backward"]}
GRAPHS = {"off": (False,), "on": (True,), "both": (False, True)}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
PROVIDERS = ("pdfast", "eager", "compile", "apex", "liger", *SDPA)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.kernels", description="Times of the operations, next to others'.")
    add_choice_of_cases(parser)
    parser.add_argument("--providers", nargs="+", choices=[*PROVIDERS, "all"], default=["pdfast", "eager", "compile"])
    parser.add_argument("--mode", nargs="+", choices=PASSES, default=["fwd"])
    parser.add_argument("--graph", choices=GRAPHS, default="off", help="CUDA graphs of the calls, the calls, or both")
    parser.add_measuring(0.2)
    options = parser.parse(arguments)
    if not (cases := chosen_cases(parser, options)):
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
            for provider in PROVIDERS if "all" in options.providers else options.providers:
                for row in _measured(case, provider, mode, options, said):
                    report.add({"op": case.op, "case": case.name, "provider": provider, "mode": mode, **row})
    return 0


def _measured(case: Case, provider: str, mode: str, options: Namespace, ceiling: Row) -> Iterator[Row]:
    """A row without CUDA graph, with one, or both."""
    common: Row = {}
    with trying(common):
        work = case.make(case.samples, options.device.type)
        fill(work)
        if mode != "fwd" and not work.differentiated:
            raise Unavailable("has no backward")
        forward = call_of(provider, case, work)
        forward()
        call = in_mode(forward, work, mode)
        comparable = provider == "pdfast" or work.same_numbers is None
        common["error"] = largest_error(forward, work, mode) if comparable else None
        must = must_move(case.make(case.samples, "meta"), partial(FlopCounterMode, display=False))
        moved = sum(must[name][0] for name in PASSES[mode])
        products = sum(must[name][1].get_total_flops() for name in PASSES[mode])
    for graph in GRAPHS[options.graph]:
        row = {"graph": graph, **common}
        if "unavailable" not in row:
            with trying(row):
                if graph and mode == "bwd":  # it runs on its forward's stream
                    raise Unavailable("a backward by itself cannot be captured: say --mode full")
                row |= quantiles(measure(captured(call) if graph else call, options.device, options.seconds))
                rate, flops = moved / row["median_ms"] / 1e6, products / row["median_ms"] / 1e9
                row |= {"must_move_mb": moved / 1e6, "gb_s": rate, "of_copy": rate / ceiling["copy_gb_s"]}
                row |= {"tflop_s": flops, "of_matmul": flops / ceiling["matmul_tflop_s"]}
        yield row


def call_of(provider: str, case: Case, work: Work) -> Callable[[], Any]:
    """The forward of `work` by `provider`. Unavailable with the reason, where that is known before it runs."""
    if provider in ("pdfast", "eager"):
        return work.kernels if provider == "pdfast" else work.plain
    if provider == "compile":
        if case.op == "adam_ema":
            raise Unavailable("reads its scalars on the host")
        torch._dynamo.reset()
        return torch.compile(work.plain, fullgraph=True)
    if case.op != (of := "attention" if provider in SDPA else "group_norm"):
        raise Unavailable(f"for {of} alone")
    if provider in SDPA:
        return sdpa_kernel(SDPA[provider])(work.plain)
    if "film" in case.name:
        raise Unavailable("has no FiLM")
    if work.reads[0].device.type != "cuda":
        raise Unavailable("runs on a GPU alone")
    try:
        return _apex(case, work) if provider == "apex" else _liger(case, work)
    except ImportError as error:
        raise Unavailable(f"{provider} is not installed ({error})") from None


def _apex(case: Case, work: Work) -> Callable[[], Any]:
    from apex.contrib.group_norm import GroupNorm

    x, weight, bias = work.reads[:3]
    act = "silu" if "silu" in case.name else ""
    norm = GroupNorm(gcd(x.shape[1], GROUPS), x.shape[1], eps=EPS, act=act).cuda().to(x.dtype)
    norm.weight, norm.bias = torch.nn.Parameter(weight.to(x.dtype)), torch.nn.Parameter(bias.to(x.dtype))
    if x.shape[1] not in GroupNorm.SUPPORTED_CHANNELS:
        raise Unavailable(f"falls back to PyTorch for {x.shape[1]} channels")
    return lambda: norm(x)


def _liger(case: Case, work: Work) -> Callable[[], Any]:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    if "silu" in case.name:
        raise Unavailable("has no SiLU")
    x, weight, bias = work.reads[:3]
    x, groups = x.detach().contiguous().requires_grad_(), gcd(x.shape[1], GROUPS)  # NCHW: what it takes
    return lambda: LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, EPS)


if __name__ == "__main__":
    sys.exit(main())
