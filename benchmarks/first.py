"""`python -m benchmarks.first`: what to know of a machine before anything else is measured on it.

How long the float32 convolutions at the ends of the networks take, with and without TF32, next to the time
that their bytes need; and the profile of one distillation update, compiled and replayed as `pdfast.distill` runs it, by kind of
work and by kernel. --json FILE says what is installed too, and beside it lies FILE's trace, for chrome://tracing or Perfetto.
"""

import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from importlib.metadata import distributions
from statistics import median

import torch
from torch.autograd import DeviceType, grad
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import Parser, Report, Row, count, header
from benchmarks.timing import ceilings, measure
from benchmarks.updates import WARM_UP, Pdfast, open_setting
from pdfast.config import EngineConfig
from pdfast.diffusion import outputs_per_channel
from pdfast.networks import few_channels
from pdfast.recipes import PRESETS

TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi")
ENDS = {"cifar10": 128, "imagenet64": 256}  # networks, and images at once
SHOWN = 40  # kernels
KINDS = {
    "group_norm": "^group_norm",
    "attention": "^attention|flash|fmha|sdpa",
    "steps, noise and loss": "^(ddim_step|diffuse)",
    "optimizer": "^adam_ema|multi_tensor_apply|lpnorm",
    "compiled by Inductor": "^triton_",
    "convolutions": "fprop|dgrad|wgrad|convolve|cudnn",
    "matrix products": "nvjet|gemm|gemv|splitk|cublas",
    "copies": "cat(array|batched)|copy|memcpy|memset",
    "rest of PyTorch": "",
}
"""What a kernel's name begins with or has in it, small letters and capitals alike: the first that fits is its kind."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.first", description="Convolutions of the ends, and one profiled update.")
    parser.add_argument("--preset", choices=PRESETS, default="cifar10", help="of the update")
    parser.add_argument("--batch", type=count, default=128, metavar="N", help="of the update")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_measuring(0.2)
    options = parser.parse(arguments)
    installed = {found.name: found.version for found in distributions()}
    installed |= {name: shutil.which(name) or "missing" for name in TOOLS}
    said = header(options.device) | ceilings(options.device, options.seconds)
    numbers = "{by:<12} {ms:9.3f} ms, {of_bytes:6.1%} of the copy's rate"
    report = Report(options.json, said, "{network:<10} {end:<8} {of:<15}", numbers)
    for row in convolutions(options.device, options.seconds, said["copy_gb_s"]):
        report.add(row)
    report.write(update=profiled_update(options), installed=installed)
    return 0


def convolutions(device: torch.device, seconds: float, copy_gb_s: float) -> Iterator[Row]:
    """The first and the last layer of each network, float32 and channels-last, under the flags of a run: by cuDNN, also with TF32,
    and by the products that a run takes."""
    for name, batch in ENDS.items():
        net, n = PRESETS[name].network, batch if device.type == "cuda" else 2
        outputs = net.image_channels * outputs_per_channel(net.prediction)
        for end, (i, o) in {"conv_in": (net.image_channels, net.channels), "conv_out": (net.channels, outputs)}.items():
            x = torch.randn(n, i, net.image_size, net.image_size, device=device).to(memory_format=torch.channels_last)
            w, bias = torch.randn(o, 3, 3, i, device=device, requires_grad=True), torch.zeros(o, device=device)
            x.requires_grad_(end == "conv_out")  # nobody asks for the images' gradient
            for by in ("cuDNN", "cuDNN, TF32", "products"):
                convolution = few_channels.convolution if by == "products" else by_cudnn
                with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32="TF32" in by):
                    calls = {"forward": torch.no_grad()(partial(convolution, x, w, bias))}
                    for of, tensor in (("input gradient", x), ("weight gradient", w)):
                        if tensor.requires_grad:  # of this one alone, or both would be computed
                            given = (t if t is tensor else t.detach() for t in (x, w, bias))
                            y = convolution(*given)
                            calls[of] = partial(grad, y, tensor, torch.ones_like(y), retain_graph=True)
                    moved = (x.nbytes + y.nbytes + w.nbytes) / 1e6
                    for of, call in calls.items():
                        ms = median(measure(call, device, seconds))
                        row = {"network": name, "batch": batch, "end": end, "of": of, "by": by, "ms": ms}
                        yield row | {"mb": moved, "of_bytes": moved / ms / copy_gb_s}


def by_cudnn(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.conv2d(x, w.permute(0, 3, 1, 2), bias, padding=1)


def profiled_update(options: Namespace) -> Row:
    """The kernels of an update by the time that they take, and how long it takes without a profiler."""
    on_gpu, row = options.device.type == "cuda", {"preset": options.preset, "batch": options.batch}
    with open_setting(PRESETS[options.preset], options.device, options.batch, EngineConfig()) as setting:
        update, began = Pdfast(setting, options.compile), time.perf_counter()
        for _ in range(WARM_UP):
            update.step()
        row["median_ms"] = median(measure(update.step, options.device, 10 * options.seconds))
        row["start_s"] = time.perf_counter() - began
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            update.step()
            if on_gpu:
                torch.cuda.synchronize()
    kind, of = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    kernels = [{"name": event.key, "calls": event.count, "ms": getattr(event, of) / 1e3} for event in events]
    row |= {"kernels": sorted(kernels, key=lambda kernel: -kernel["ms"]), "kernels_ms": sum(k["ms"] for k in kernels)}
    print("{preset}, {batch} images: ready after {start_s:.1f} s, {median_ms:.2f} ms an update; ".format(**row), end="")
    print(f"{sum(kernel['calls'] for kernel in kernels)} kernels of {row['kernels_ms']:.2f} ms in all")
    row["kinds"] = {kind: sum(k["ms"] for k in kernels if kind_of(k["name"]) == kind) for kind in KINDS}
    for kind, ms in row["kinds"].items():
        print(f"{ms:9.3f} ms {ms / max(row['kernels_ms'], 1e-9):6.1%} {kind}")
    for kernel in row["kernels"][:SHOWN]:
        print("{ms:9.3f} ms {calls:6} x {name:.120}".format(**kernel))
    if options.json:
        profiler.export_chrome_trace(str(options.json.with_suffix(".trace.json.gz")))
    return row


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


if __name__ == "__main__":
    sys.exit(main())
