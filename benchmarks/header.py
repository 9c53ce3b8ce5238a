"""What a result must say of the machine and the code that it is from."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pdfast_kernels._triton import triton

ROOT = Path(__file__).parent.parent


def header(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware, versions, commit and date; for None nothing ran on a device, and there is no hardware to name."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"torch": torch.__version__, "triton": triton.__version__ if triton else "none"}
    return {**_hardware(device), **versions, "python": platform.python_version(), "commit": _commit(), "date": now}


def _hardware(device: torch.device | None) -> dict[str, Any]:
    if device is None:
        return {}
    cpu = f"{_cpu()}, {torch.get_num_threads()} threads"
    if device.type != "cuda":
        return {"device": cpu}
    gpu = torch.cuda.get_device_properties(device)
    arch = f"sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} processors, {gpu.total_memory >> 20} MiB"
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    versions = {"driver": driver, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"device": gpu.name, "gpu": arch, "cpu": cpu, **versions}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, f"{platform.machine()} CPU")


def _commit() -> str:
    return _said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
