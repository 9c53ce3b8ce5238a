"""The machine a run is on."""

import ctypes
import os
import platform
import subprocess
import warnings
from pathlib import Path

import torch

from pdfast.io.errors import UsageError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_GIB = 1 << 30
UNTRIED = "is not supported: the kernels, CUDA graphs and checks of memory are for NVIDIA's GPUs"
OTHERS = {"mps": "Apple's GPUs", "xpu": "Intel's GPUs", "hpu": "Gaudi", "xla": "TPUs", "npu": "Ascend's NPUs"}
"""What torch has devices for and this program was never run on."""


def open_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:N`; under torchrun `cuda` is the process's own GPU.

    UsageError where there is none such, or fewer GPUs than processes of this machine.
    """
    rocm = getattr(torch.version, "hip", None)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not rocm else "cpu"
        if rocm:
            warnings.warn(f"this torch is for AMD's GPUs (ROCm {rocm}), which {UNTRIED}: the CPU is used", stacklevel=2)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        _keep_freed_memory()
    elif device.type == "cuda" and rocm:
        raise UsageError(f"this torch is for AMD's GPUs (ROCm {rocm}), which {UNTRIED}: say --device cpu")
    elif device.type == "cuda":
        _check_count(device)
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type in OTHERS:
        raise UsageError(f"device {name!r} ({OTHERS[device.type]}) {UNTRIED}: say --device cpu")
    else:
        raise UsageError(f"device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
    return device


def _check_count(device: torch.device) -> None:
    count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.index is not None and (device.index >= count or processes > 1):
        reason = f"this machine has {count} GPUs" if processes == 1 else f"{processes} processes share this machine"
        raise UsageError(f"device '{device}' is not for this process: {reason}; use --device cuda, cpu or auto")
    if processes == 1 and count == 0:
        raise UsageError("this machine has no GPU that torch can use: say --device cpu")
    if processes > count:
        raise UsageError(
            f"{processes} processes, but this machine has {count} GPUs: use --nproc-per-node {max(count, 1)}, or --device cpu"
        )


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it: an update on a CPU otherwise spends a quarter of its time in
    page faults for the same few megabytes (4000 faults an update for `digits`)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_THRESHOLD, _GIB), (_M_TRIM_THRESHOLD, _GIB), (_M_TOP_PAD, _GIB >> 4)):
            libc.mallopt(parameter, value)


def describe(device: torch.device) -> str:
    """Return the hardware in words, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Return the commit of the checkout this package lies in, with a + where it was changed; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() if tracked.returncode == 0 else None
