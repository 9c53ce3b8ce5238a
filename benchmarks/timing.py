"""How long a call takes, what memory it needs, and what the machine can do at most."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import Unavailable

Call = Callable[[], object]
LEAST = 3  # calls
CEILING_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
CEILING_SIZE = {"cuda": 8192, "cpu": 256}


def measure(call: Call, device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of each call, after a warm-up, for about `seconds`. On a GPU the L2 cache is overwritten before each."""
    elapsed: list[float] = []
    if device.type == "cuda":
        from triton.testing import do_bench

        while len(elapsed) < LEAST:
            elapsed += do_bench(call, warmup=100 * seconds, rep=1e3 * seconds, return_mode="all")
        return elapsed
    call()
    end = time.perf_counter() + seconds
    while len(elapsed) < LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        elapsed.append(1e3 * (time.perf_counter() - start))
    return elapsed


def quantiles(elapsed: Iterable[float]) -> dict[str, float]:
    times = torch.tensor(list(elapsed), dtype=torch.float64)
    p20, middle, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"median_ms": middle, "p20_ms": p20, "p80_ms": p80, "calls": len(times)}


def captured(call: Call) -> Callable[[], None]:
    """The call as a CUDA graph."""
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need a GPU")
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
    source = torch.ones(CEILING_BYTES[device.type] // 4, device=device)
    target, size = torch.empty_like(source), CEILING_SIZE[device.type]
    copy = median(measure(lambda: target.copy_(source), device, seconds))
    rates = {"copy_gb_s": 2 * source.nbytes / copy / 1e6}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = median(measure(partial(torch.mm, a, b), device, seconds))
        rates[f"matmul_{name}_tflop_s"] = 2 * size**3 / product / 1e9
    return rates | {"matmul_tflop_s": max(rates["matmul_bf16_tflop_s"], rates["matmul_fp32_tflop_s"])}


def peak_mib(call: Call, device: torch.device, kept: Iterable[Tensor]) -> float:
    """The most memory during the call, MiB: what the allocator gave on a GPU, elsewhere the `kept` tensors and what was
    allocated on top of them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) / 2**20
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return (sum(storages.values()) + most) / 2**20
