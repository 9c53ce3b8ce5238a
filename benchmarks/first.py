"""`python -m benchmarks.first`: what to know of a machine before anything else is measured on it.

What is installed; how long the float32 convolutions at the ends of the networks take, with and without TF32, next to the time
that their bytes need; and the profile of one distillation update, compiled and replayed as `pdfast.distill` runs it.
Beside --json FILE lies FILE's trace, for chrome://tracing or Perfetto.
"""

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.arguments import Parser
from benchmarks.clocks import clocked
from benchmarks.header import header
from benchmarks.timing import ceilings, measure
from benchmarks.updates import Pdfast, open_setting
from pdfast.config import EngineConfig
from pdfast.diffusion import outputs_per_channel
from pdfast.engine.device import open_device
from pdfast.presets import PRESETS

PACKAGES = (
    "numpy",
    "safetensors",
    "tensorboard",
    "torchmetrics",
    "tyro",
    "diffusers",
    "nvidia-dali-cuda130",
    "pytest",
    "pytest-xdist",
)
TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi")
ENDS = {"cifar10": 128, "imagenet64": 256}  # networks, and images at once
WARM_UP = 4  # updates: compile, record a graph, and one more
SHOWN = 40  # kernels

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.first", description="What is installed, convolutions of the ends, one profiled update.")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--preset", choices=PRESETS, default="cifar10", help="of the update")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="of the update")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each convolution")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    parser.check_writable(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU: say --device cpu")
    if options.batch < 1 or options.seconds <= 0:
        parser.error("--batch is at least 1, --seconds more than 0")
    device = open_device(options.device or "auto")
    report = {"header": header(device), "installed": installed()}
    for title, entries in report.items():
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in entries.items()), flush=True)
    report["ceilings"] = ceilings(device, options.seconds)
    report["convolutions"] = []
    for row in convolutions(device, options.seconds, report["ceilings"]["copy_gb_s"]):
        report["convolutions"].append(row)
        print(
            "{network:<10} {end:<8} {of:<15} TF32 {tf32:<3} {ms:9.3f} ms, {of_bytes:6.1%} of the copy's rate".format(
                **row
            ),
            flush=True,
        )
        _write(options, report)
    report["update"] = profiled_update(options, device)
    _write(options, report)
    return 0


def _write(options: Namespace, report: Row) -> None:
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def installed() -> Row:
    """Versions of what the parts of the queue use, and where tools are; `missing` for what is not there."""
    found: Row = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {name: shutil.which(name) or "missing" for name in TOOLS}


def convolutions(device: torch.device, seconds: float, copy_gb_s: float) -> Iterator[Row]:
    """The first and the last layer of each network, float32 and channels-last, under the flags of a run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    for name, batch in ENDS.items():
        network = PRESETS[name].network
        pixels = network.image_channels
        ends = {
            "conv_in": (pixels, network.channels),
            "conv_out": (network.channels, pixels * outputs_per_channel(network.prediction)),
        }
        for end, (inputs, outputs) in ends.items():
            calls = _calls(batch if device.type == "cuda" else 2, inputs, outputs, network.image_size, device)
            for of, (call, moved) in calls.items():
                for tf32 in (False, True):
                    if end == "conv_in" and of == "input gradient":
                        continue  # nobody asks for it
                    cudnn.deterministic, cudnn.allow_tf32 = True, tf32
                    try:
                        ms = measure(call, device, seconds).median
                    finally:
                        cudnn.deterministic, cudnn.allow_tf32 = before
                    row = {
                        "network": name,
                        "batch": batch,
                        "end": end,
                        "of": of,
                        "tf32": "on" if tf32 else "off",
                        "ms": ms,
                    }
                    yield row | {"mb": moved / 1e6, "of_bytes": moved / 1e6 / ms / copy_gb_s}


def _calls(
    batch: int, inputs: int, outputs: int, size: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, and the bytes that it must move."""
    nhwc = {"device": device, "memory_format": torch.channels_last}
    x, y, w = (
        torch.empty(shape, **nhwc).normal_()
        for shape in ((batch, inputs, size, size), (batch, outputs, size, size), (outputs, inputs, 3, 3))
    )
    bias = torch.zeros(outputs, device=device)
    ones, zeros = [1, 1], [0, 0]

    def gradient(*mask: bool) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(y, x, w, [outputs], ones, ones, ones, False, zeros, 1, mask)

    moved = sum(tensor.nbytes for tensor in (x, y, w))
    return {
        "forward": (lambda: torch.conv2d(x, w, bias, padding=1), moved),
        "input gradient": (gradient(True, False, False), moved),
        "weight gradient": (gradient(False, True, True), moved),
    }


def profiled_update(options: Namespace, device: torch.device) -> Row:
    """The kernels of an update by the time that they take, and how long it takes without a profiler."""
    with open_setting(PRESETS[options.preset], device, options.batch, EngineConfig()) as (setting, machine):
        update, began = Pdfast(setting, machine(options.compile)), time.perf_counter()
        for _ in range(WARM_UP):
            update.step()
        times = sorted(clocked(update.step, device, 10 * options.seconds))
        row: Row = {"preset": options.preset, "batch": options.batch, "start_s": time.perf_counter() - began}
        row["median_ms"] = times[len(times) // 2]
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as profiler:
            update.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = [event for event in profiler.key_averages() if event.device_type == kind]
    kernels = sorted(averages, key=lambda event: -getattr(event, of))
    row["kernels_ms"] = sum(getattr(event, of) for event in kernels) / 1e3
    row["kernels"] = [{"name": e.key, "calls": e.count, "ms": getattr(e, of) / 1e3} for e in kernels]
    print(
        f"{options.preset}, {options.batch} images: ready after {row['start_s']:.1f} s, {row['median_ms']:.2f} ms an update; "
        f"{sum(event.count for event in kernels)} kernels of {row['kernels_ms']:.2f} ms in all"
    )
    for kernel in row["kernels"][:SHOWN]:
        print("{ms:9.3f} ms {calls:6} x {name:.120}".format(**kernel))
    if options.json:
        profiler.export_chrome_trace(str(options.json.with_suffix(".trace.json.gz")))
    return row


if __name__ == "__main__":
    sys.exit(main())
