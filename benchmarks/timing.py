"""How long a call takes, and what the machine can do at most: measured, in one run, on the same device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

FLUSHED_BYTES = 256 << 20  # several times the L2 cache of any GPU
CEILING_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
CEILING_SIZE = {"cuda": 8192, "cpu": 256}
LEAST_CALLS, MOST_CALLS = 5, 1000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    calls: int


def measure(call: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """`call`, after a warm-up, again and again for about `seconds`. On a GPU the L2 cache is overwritten before each."""
    call()
    elapsed = _on_gpu(call, seconds) if device.type == "cuda" else _on_cpu(call, seconds)
    p20, median, p80 = torch.tensor(elapsed).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Timing(median, p20, p80, len(elapsed))


def _on_cpu(call: Callable[[], object], seconds: float) -> list[float]:
    elapsed, began = [], time.perf_counter()
    while len(elapsed) < LEAST_CALLS or (time.perf_counter() - began < seconds and len(elapsed) < MOST_CALLS):
        start = time.perf_counter()
        call()
        elapsed.append(1e3 * (time.perf_counter() - start))
    return elapsed


def _on_gpu(call: Callable[[], object], seconds: float) -> list[float]:
    flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        flushed.zero_()
        call()
    torch.cuda.synchronize()
    estimate = (time.perf_counter() - start) / 3
    count = int(min(max(seconds / max(estimate, 1e-6), LEAST_CALLS), MOST_CALLS))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        flushed.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings(device: torch.device, seconds: float) -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written), and the rates of large matrix products in TFLOP/s."""
    kind = device.type
    source = torch.ones(CEILING_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, seconds)
    size = CEILING_SIZE[kind]
    rates = {"copy_gb_s": 2 * _bytes(source) / copy.median / 1e6}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = measure(partial(torch.mm, a, b), device, seconds)
        rates[f"matmul_{name}_tflop_s"] = 2 * size**3 / product.median / 1e9
    return rates | {"matmul_tflop_s": max(rates["matmul_bf16_tflop_s"], rates["matmul_fp32_tflop_s"])}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
