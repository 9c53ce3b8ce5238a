"""`python -m benchmarks.step`: one distillation update of pdfast next to what others make of it, on random images.

A row is a provider and a variant (`--list`) at a preset and a batch. `ms` is of an update from its images to the new
weights; `TFLOP/s` is of five forwards (two of the teacher, three for the student's forward and backward), `MFU` of a large
matrix product in bf16 or fp32, whichever is faster, measured in the same run; `MiB` is the most memory of an update, with
the weights and the optimizer's state (on a CPU of tensors alone); `error` is the largest difference of a sample's loss from
float64 in the first update, of the largest loss, and tells a provider that computes something else. The breakdown is of the networks
by themselves, measured after, and of the rest. On a CPU the variants take turns; on a GPU each has the device to itself.
"""

import gc
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import rivals
from benchmarks.command import Parser, Report, Row, count, header, reason
from benchmarks.ours import Pdfast
from benchmarks.timing import captured, ceilings, measure, peak_mib, quantiles
from benchmarks.updates import WARM_UP, Setting, distillation_losses, open_setting, reference
from pdfast.config import EngineConfig
from pdfast.engine.cost import parameters_and_flops
from pdfast.io.errors import UsageError
from pdfast.methods import Progressive
from pdfast.recipes import PRESETS

PROVIDERS = ("eager", "pdfast", "compile", "diffusers")
MODES = {"cuda": ("default", "reduce-overhead", "max-autotune-no-cudagraphs"), "cpu": ("default",)}
DIFFUSERS = {"eager": None, "compile": "default"}
TURNS = {"cuda": 1, "cpu": 5}
CHECKED = 8  # samples
SAMPLING_STEPS = (1, 4)
OUT_OF_MEMORY = "out of memory"


@dataclass
class Variant:
    """A way to make an update, and its row."""

    row: Row
    build: Callable[[], Any]
    update: Any = None
    elapsed: list[float] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.step", description="Images/s, memory and breakdown of a distillation update.")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="imagenet64 on a GPU, digits on a CPU unless said")
    parser.add_argument("--batch", type=count, metavar="N", help="images an update, the preset's unless said")
    parser.add_argument("--halve", action="store_true", help="while one lacks memory, all at half the batch")
    parser.add_argument("--providers", nargs="+", choices=[*PROVIDERS, "all"], default=["all"])
    parser.add_argument("--modes", nargs="+", choices=MODES["cuda"], help="of torch.compile: a row each")
    parser.add_argument("--sampling", action="store_true", help="images/s of 1 and 4 steps too")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="bf16 on a GPU unless said")
    ways = ["auto", "on", "off"]
    parser.add_argument("--compile", nargs="+", choices=ways, default=["auto"], help="pdfast: a row each")
    parser.add_measuring(10.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print providers and variants, and nothing else")
    options = parser.parse(arguments)
    if options.list:
        print("\n".join(_title(variant.row) for variant in _variants(options, None, None)))
        return 0
    said = header(options.device) | ceilings(options.device, min(options.seconds, 0.5))
    numbers = "{images_per_second:9.1f} images/s {median_ms:9.2f} ms ({p20_ms:.2f} .. {p80_ms:.2f}) {dtype:<13} "
    numbers += "{tflop_s:8.3f} TFLOP/s MFU {mfu:6.1%} {peak_mib:9.1f} MiB error {error:.1e}; {breakdown_ms}"
    numbers += "; images/s by steps {sampled_images_per_second}" if options.sampling else ""
    report = Report(options.json, said, "{preset:<12} {batch:>5} {provider:<9} {variant:<26}", numbers)
    try:
        for name in options.preset or ["imagenet64" if options.device.type == "cuda" else "digits"]:
            batch = options.batch or PRESETS[name].batch_size
            while _lacks_memory(options, name, batch, report) and batch > 1:
                batch //= 2
    except UsageError as error:
        parser.error(str(error))
    return 0


def _variants(options: Namespace, setting: Setting | None, machine: Any) -> list[Variant]:
    """machine: a function that gives that of a value of --compile."""
    modes = options.modes or MODES[options.device.type]
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "eager": {"": partial(rivals.eager, setting)},
        "pdfast": {f"compile {c}": lambda c=c: Pdfast(setting, machine(c)) for c in options.compile},
        "compile": {mode: partial(rivals.compiled, setting, mode) for mode in modes},
        "diffusers": {name: partial(rivals.diffusers, setting, mode) for name, mode in DIFFUSERS.items()},
    }
    chosen = PROVIDERS if "all" in options.providers else options.providers
    return [Variant({"provider": p, "variant": way}, build) for p in chosen for way, build in ways[p].items()]


def _lacks_memory(options: Namespace, name: str, batch: int, report: Report) -> bool:
    """Measure all variants at a batch, their rows added to `report` as they are done; with --halve no more of them, and true,
    once one lacks memory."""
    device, turns = options.device, TURNS[options.device.type]
    seconds = options.seconds / turns
    with open_setting(PRESETS[name], device, batch, EngineConfig(dtype=options.dtype)) as (setting, machine):
        variants = _variants(options, setting, machine)
        for variant in variants:
            variant.row |= {"preset": name, "batch": batch}
        for group in [[v] for v in variants] if device.type == "cuda" else [variants]:
            for variant in group:
                _trying(variant, lambda v: _prepare(v, setting))
            for _ in range(turns):
                for variant in group:
                    _trying(variant, lambda v: v.elapsed.extend(measure(v.update.step, device, seconds)))
            for variant in group:
                _trying(variant, lambda v: _conclude(v, setting, options, report.said))
                variant.update = variant.build = None
                report.add(variant.row)
            torch._dynamo.reset()
            _free(device)
            if options.halve and any(OUT_OF_MEMORY in variant.row.get("unavailable", "") for variant in group):
                return True
    return False


def _trying(variant: Variant, part: Callable[[Variant], object]) -> None:
    """A part of the measurement; where it fails, the row says why and the update is let go."""
    if "unavailable" in variant.row:
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part(variant)
        said = [str(warning.message) for warning in caught]
        fallen = [line for line in said if "without a CUDA graph" in line or "runs in PyTorch" in line]
        variant.row |= {"fell_back": fallen[0]} if fallen else {}
        return
    except UsageError:
        raise
    except torch.cuda.OutOfMemoryError:
        variant.row["unavailable"] = f"{OUT_OF_MEMORY} at batch {variant.row['batch']}"
    except Exception as failure:  # of another provider, of whatever kind
        variant.row["unavailable"] = reason(failure)
    variant.update = None


def _prepare(variant: Variant, setting: Setting) -> None:
    """Build it, run every graph, measure its memory, compare its losses."""
    device, began = setting.device, time.perf_counter()
    variant.update = update = variant.build()
    update.step()
    error = _error(update, setting) if update.has_weights_of_setting else None
    peak = peak_mib(lambda: [update.step() for _ in range(WARM_UP - 1)], device, update.tensors())
    variant.row |= {"device": device.type, "dtype": update.dtype, "peak_mib": peak, "error": error}
    variant.row["start_s"] = time.perf_counter() - began
    print(f"{_title(variant.row)}: ready after {variant.row['start_s']:.1f} s", flush=True)


def _error(update: Any, setting: Setting) -> float:
    """Of the update just made, the first, which has changed weights after its losses were there."""
    batch, losses = update.drawn().first(CHECKED), update.losses[:CHECKED].double()
    on_device = ({name: w.to(setting.device) for name, w in weights.items()} for weights in setting.weights)
    teacher, student = (reference(setting.config.network, weights) for weights in on_device)
    with torch.no_grad():
        expected = distillation_losses(teacher, student, batch, setting, torch.float64)
    return float((losses - expected).abs().max() / expected.abs().max())


def _conclude(variant: Variant, setting: Setting, options: Namespace, said: Row) -> None:
    """The rates, then what changes the update: its stages, and sampling from it."""
    row, update, batch = variant.row, variant.update, setting.config.batch_size
    row |= quantiles(variant.elapsed)
    parameters, flops = parameters_and_flops(setting.config.network)
    rate = Progressive.cost.flops * flops * batch / row["median_ms"] / 1e9
    row |= {"images_per_second": 1e3 * batch / row["median_ms"], "tflop_s": rate, "mfu": rate / said["matmul_tflop_s"]}
    row["parameters"] = parameters
    try:
        row["breakdown_ms"] = _breakdown(update, setting, options.seconds / 12, row["median_ms"])
    except Exception as failure:  # such as no memory for a graph of the backward alone: the rest of the row stands
        row["breakdown_ms"] = reason(failure)
    for steps in SAMPLING_STEPS if options.sampling else ():
        times = measure(partial(update.sample, steps), setting.device, options.seconds / 8)
        row.setdefault("sampled_images_per_second", {})[str(steps)] = 1e3 * batch / median(times)


def _breakdown(update: Any, setting: Setting, seconds: float, whole: float) -> dict[str, float]:
    """Milliseconds of an update's two forwards of the teacher, the student's forward and backward, and all the rest. Called as
    in the update, with and without gradient, or what is compiled would be compiled again."""
    drawn, (teacher, student) = update.drawn(), update.networks()
    _free(setting.device)
    z, phi = drawn.x.float(), torch.ones(len(drawn.x), device=setting.device)

    def timed(network: Any, backward: bool) -> float:
        def call() -> None:
            with update.running(), torch.set_grad_enabled(backward):
                output = network(z, phi, drawn.labels)
                if backward:
                    output.square().mean().backward()

        graphed = setting.device.type == "cuda" and isinstance(update, Pdfast)
        return median(measure(captured(call) if graphed else call, setting.device, seconds))

    twice, both = 2 * timed(teacher, False), timed(student, True)
    return {"teacher": round(twice, 3), "student": round(both, 3), "rest": round(whole - twice - both, 3)}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _title(row: Row) -> str:
    return f"{row['provider']} {row['variant']}".strip()


if __name__ == "__main__":
    sys.exit(main())
