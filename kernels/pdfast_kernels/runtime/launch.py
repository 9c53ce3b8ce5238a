"""How a kernel is launched. Every launch of the package goes through `launch`, so that what is shipped can be listed, with
its configuration, and compiled for a GPU that is not there: `recorded`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_recording: "ContextVar[tuple[list[Launch] | None, int]]" = ContextVar("pdfast_kernels.recording", default=(None, 90))


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its grid, its arguments by name (constexpr ones too), and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int = 2, **arguments: Any) -> None:
    """Run `kernel` on the GPU of its tensors (or in the interpreter). A grid with a zero in it does nothing."""
    if 0 in grid:
        return
    record, _ = _recording.get()
    if record is not None:
        record.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Within it, this thread's launches (on meta tensors, say) are listed and not run, configured for sm_`arch`."""
    launches: list[Launch] = []
    token = _recording.set((launches, arch))
    try:
        yield launches
    finally:
        _recording.reset(token)


def arch_of(device: torch.device) -> int:
    """80, 90, 100 ...: what the configuration tables are indexed by."""
    if device.type != "cuda":
        return _recording.get()[1]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
