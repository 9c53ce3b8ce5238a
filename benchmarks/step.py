"""`python -m benchmarks.step`: one distillation update of pdfast next to what others make of it, on random images.

A row is a provider and a variant (`--list`) at a preset and a batch. `ms` is of an update from its images to the new
weights; `TFLOP/s` is of five forwards (two of the teacher, three for the student's forward and backward), `MFU` of a large
matrix product in bf16 or fp32, whichever is faster, measured in the same run; `MiB` is the most memory of an update, with
the weights and the optimizer's state (on a CPU of tensors alone). The breakdown is of the networks by themselves, measured after,
and of the rest. On a CPU the variants take turns; on a GPU each has the device to itself.
"""

import gc
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.command import Parser, Report, Row, count, header, reason, trying
from benchmarks.timing import captured, ceilings, measure, peak_mib, quantiles
from benchmarks.updates import WARM_UP, Pdfast, Rival, Setting, open_setting
from pdfast.config import EngineConfig
from pdfast.diffusion import sample
from pdfast.engine.cost import inputs, parameters_and_flops
from pdfast.io.errors import UsageError
from pdfast.methods import Progressive
from pdfast.recipes import PRESETS

PROVIDERS = ("eager", "pdfast", "compile", "diffusers")
MODES = {"cuda": ("default", "reduce-overhead", "max-autotune-no-cudagraphs"), "cpu": ("default",)}
TURNS = {"cuda": 1, "cpu": 5}
SAMPLING_STEPS = (1, 4)


@dataclass
class Variant:
    """A way to make an update, and its row."""

    row: Row
    build: Callable[[Setting], Any]
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
    parser.add_argument("--list", action="store_true", help="print providers and variants, and nothing else")
    parser.add_measuring(10.0)
    options = parser.parse(arguments)
    if options.list:
        print("\n".join("{provider} {variant}".format(**variant.row).strip() for variant in _variants(options)))
        return 0
    numbers = "{images_per_second:9.1f} images/s {median_ms:9.2f} ms ({p20_ms:.2f} .. {p80_ms:.2f}) {dtype:<13} "
    numbers += "{tflop_s:8.3f} TFLOP/s MFU {mfu:6.1%} {peak_mib:9.1f} MiB; {breakdown_ms}"
    numbers += "; images/s by steps {sampled_images_per_second}" if options.sampling else ""
    said = header(options.device) | ceilings(options.device, min(options.seconds, 0.5))
    report = Report(options.json, said, "{preset:<12} {batch:>5} {provider:<9} {variant:<26}", numbers)
    try:
        for name in options.preset or ["imagenet64" if options.device.type == "cuda" else "digits"]:
            batch = options.batch or PRESETS[name].batch_size
            while _lacks_memory(options, name, batch, report) and batch > 1:
                batch //= 2
    except UsageError as error:
        parser.error(str(error))
    return 0


def _variants(options: Namespace) -> list[Variant]:
    modes = options.modes or MODES[options.device.type]
    ways: dict[str, dict[str, Callable[[Setting], Any]]] = {
        "eager": {"": partial(Rival, mode=None)},
        "pdfast": {f"compile {value}": partial(Pdfast, compile=value) for value in options.compile},
        "compile": {mode: partial(Rival, mode=mode) for mode in modes},
        "diffusers": {
            name: partial(Rival, mode=mode, diffusers=True) for name, mode in (("eager", None), ("compile", "default"))
        },
    }
    chosen = PROVIDERS if "all" in options.providers else options.providers
    return [Variant({"provider": p, "variant": way}, build) for p in chosen for way, build in ways[p].items()]


def _lacks_memory(options: Namespace, name: str, batch: int, report: Report) -> bool:
    """Measure all variants at a batch, their rows added to `report` as they are done; with --halve no more of them, and true,
    once one lacks memory."""
    device, turns = options.device, TURNS[options.device.type]
    with open_setting(PRESETS[name], device, batch, EngineConfig(dtype=options.dtype)) as setting:
        variants = _variants(options)
        parts = [partial(_prepare, setting), *[partial(_time, device, options.seconds / turns)] * turns]
        for group in [[v] for v in variants] if device.type == "cuda" else [variants]:
            for part in (*parts, partial(_conclude, setting, options, report.said)):
                for variant in group:
                    if "unavailable" not in variant.row:
                        with trying(variant.row):
                            part(variant)
            for variant in group:
                variant.update = None
                report.add({"preset": name, "batch": batch, **variant.row})
            torch._dynamo.reset()
            _free(device)
            if options.halve and any(variant.row.get("unavailable") == "out of memory" for variant in group):
                return True
    return False


def _prepare(setting: Setting, variant: Variant) -> None:
    """Build it, run every graph, measure its memory."""
    device, began = setting.device, time.perf_counter()
    variant.update = update = variant.build(setting)
    update.step()
    peak = peak_mib(lambda: [update.step() for _ in range(WARM_UP - 1)], device, update.tensors())
    start = time.perf_counter() - began
    variant.row |= {"device": device.type, "dtype": update.dtype, "peak_mib": peak, "start_s": start}
    print("{provider} {variant}: ready after {start_s:.1f} s".format(**variant.row), flush=True)


def _time(device: torch.device, seconds: float, variant: Variant) -> None:
    variant.elapsed += measure(variant.update.step, device, seconds)


def _conclude(setting: Setting, options: Namespace, said: Row, variant: Variant) -> None:
    """The rates, then what changes the update: its stages, and sampling from it."""
    row, update, batch = variant.row, variant.update, setting.config.batch_size
    row |= quantiles(variant.elapsed)
    parameters, flops = parameters_and_flops(setting.config.network)
    cost = Progressive.round_cost(setting.config, setting.config.round_steps[0])
    rate = cost.flops * flops * batch / row["median_ms"] / 1e9
    row |= {"images_per_second": 1e3 * batch / row["median_ms"], "tflop_s": rate, "mfu": rate / said["matmul_tflop_s"]}
    row["parameters"] = parameters
    try:
        row["breakdown_ms"] = _breakdown(update, setting, options.seconds / 12, row["median_ms"])
    except Exception as failure:  # such as no memory for a graph of the backward alone: the rest of the row stands
        row["breakdown_ms"] = reason(failure)
    for steps in SAMPLING_STEPS if options.sampling else ():
        times = measure(partial(_draw, update, setting, steps), setting.device, options.seconds / 8)
        row.setdefault("sampled_images_per_second", {})[str(steps)] = 1e3 * batch / median(times)


def _breakdown(update: Any, setting: Setting, seconds: float, whole: float) -> dict[str, float]:
    """Milliseconds of an update's two forwards of the teacher, the student's forward and backward, and all the rest. Called as
    in the update, with and without gradient, or what is compiled would be compiled again."""
    z, phi, cond = inputs(setting.config.network, setting.config.batch_size, setting.device)
    z, (teacher, student) = z.normal_(), update.networks()
    _free(setting.device)

    def timed(network: Any, backward: bool) -> float:
        def call() -> None:
            with update.running(), torch.set_grad_enabled(backward):
                output = network(z, phi, cond)
                if backward:
                    output.square().mean().backward()

        graphed = setting.device.type == "cuda" and isinstance(update, Pdfast)
        return median(measure(captured(call) if graphed else call, setting.device, seconds))

    twice, both = 2 * timed(teacher, False), timed(student, True)
    return {"teacher": round(twice, 3), "student": round(both, 3), "rest": round(whole - twice - both, 3)}


@torch.no_grad()
def _draw(update: Any, setting: Setting, steps: int) -> None:
    """A batch of images, down to uint8 on the host."""
    config = setting.config
    z, _, cond = inputs(config.network, config.batch_size, setting.device)
    with update.running():
        schedule, prediction = config.schedule.build(), config.network.prediction
        x = sample(update.networks()[0], z.normal_(), schedule, steps, cond=cond, prediction=prediction)
    ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
