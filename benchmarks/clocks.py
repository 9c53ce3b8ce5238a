"""How long updates and their stages take, one after the other as in a run, and the memory that they need."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LEAST = 3


def clocked(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of each of at least three calls, for about `seconds`. On a GPU they are those from one call's end to
    the next's: the host does not wait in between."""
    if device.type != "cuda":
        elapsed, end = [], time.perf_counter() + seconds
        while len(elapsed) < LEAST or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            elapsed.append(1e3 * (time.perf_counter() - start))
        return elapsed
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(LEAST, int(seconds / (time.perf_counter() - began)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def peak_mib(call: Callable[[], object], device: torch.device, kept: Iterable[Tensor]) -> float:
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


class Stopwatch:
    """The milliseconds of stages: what is between two marks belongs to the stage that the second names.

    On a GPU marks are events; those that were recorded into a CUDA graph are recorded again by each replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []
        self._marking: list[tuple[str, object]] = []

    def _now(self) -> object:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        return event

    def mark(self, stage: str) -> None:
        """`stage` ends here."""
        self._marking.append((stage, self._now()))

    def _stages(self, call: Callable[[], object]) -> dict[str, float]:
        self._marking = []
        last = self._now()
        call()
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks = self._marking or self._marks
        spent: dict[str, float] = {}
        for stage, moment in self._marks:
            took = last.elapsed_time(moment) if self._on_gpu else 1e3 * (moment - last)  # type: ignore
            spent[stage], last = spent.get(stage, 0.0) + took, moment
        return spent

    def medians(
        self, call: Callable[[], object], stages: Iterable[str], warm_up: int, seconds: float
    ) -> dict[str, float]:
        """Of `stages`, over calls for about `seconds` after the first `warm_up`."""
        for _ in range(warm_up):
            self._stages(call)
        seen, end = [], time.perf_counter() + seconds
        while len(seen) < LEAST or time.perf_counter() < end:
            seen.append(self._stages(call))
        return {stage: sorted(spent.get(stage, 0.0) for spent in seen)[len(seen) // 2] for stage in stages}
