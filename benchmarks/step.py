"""`python -m benchmarks.step`: one distillation update of pdfast next to what others make of it, on random images.

A row is a provider and a variant (`--list`) at a preset and a batch. `ms` is of an update from its images to the new
weights; `TFLOP/s` is of five forwards (two of the teacher, three for the student's forward and backward), `MFU` of a large
matrix product in bf16 or fp32, whichever is faster, measured in the same run; `MiB` is the most memory of an update, with
the weights and the optimizer's state (on a CPU of tensors alone); `error` is the largest difference of a sample's loss from
float64, of the largest loss, and tells a provider that computes something else. The breakdown is measured after, in
updates of its own. On a CPU the variants take turns; on a GPU each has the device to itself.
"""

import gc
import json
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks import rivals
from benchmarks.arguments import Parser
from benchmarks.clocks import Stopwatch, clocked, peak_mib
from benchmarks.header import header
from benchmarks.providers import Unavailable
from benchmarks.updates import STAGES, Pdfast, Setting, distillation_losses, open_setting
from pdfast.config import EngineConfig, OptimizerName
from pdfast.engine.device import open_device
from pdfast.engine.metrics import peak_flops
from pdfast.errors import UsageError
from pdfast.presets import PRESETS

PROVIDERS = ("eager", "pdfast", "compile", "diffusers")
MODES = {"cuda": ("default", "reduce-overhead", "max-autotune-no-cudagraphs"), "cpu": ("default",)}
WARM_UP = 4  # updates: compile, record a graph, and one more
CHECKED = 8  # samples
TURNS = 5
SAMPLING_STEPS = (1, 4)
LACKED = "out of memory"

Row = dict[str, Any]


@dataclass
class Variant:
    """A way to make an update, and its row."""

    row: Row
    build: Callable[[], Any]
    update: Any = None
    elapsed: tuple[float, ...] = ()

    @property
    def runs(self) -> bool:
        return "unavailable" not in self.row


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    parser.check_writable(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU: say --device cpu")
    if options.batch is not None and options.batch < 1:
        parser.error("--batch is at least 1")
    if options.micro_batches < 1 or options.seconds <= 0:
        parser.error("--micro-batches is at least 1, --seconds more than 0")
    device = open_device(options.device or "auto")
    presets = options.preset or ["imagenet64" if device.type == "cuda" else "digits"]
    if options.list:
        print("\n".join(_title(variant.row) for variant in _variants(options, device, None, None)))
        return 0
    said = header(device) | _ceilings(device, min(options.seconds, 0.5))
    print(", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in said.items()))
    rows: list[Row] = []
    try:
        for name in presets:
            batch = options.batch or PRESETS[name].batch_size
            while _lacks_memory(options, device, name, batch, said, rows) and batch > 1:
                batch //= 2
            _summary([row for row in rows if row["preset"] == name and row["batch"] == batch])
    except UsageError as error:
        parser.error(str(error))
    return 0


def _parser() -> Parser:
    parser = Parser("benchmarks.step", description="Images/s, memory and breakdown of a distillation update.")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="imagenet64 on a GPU, digits on a CPU unless said")
    parser.add_argument("--batch", type=int, metavar="N", help="images an update, the preset's unless said")
    parser.add_argument("--halve", action="store_true", help="while one lacks memory, all at half the batch")
    parser.add_argument("--providers", nargs="+", choices=[*PROVIDERS, "all"], default=["all"])
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    parser.add_argument("--sampling", action="store_true", help="images/s of 1 and 4 steps too")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="bf16 on a GPU unless said")
    parser.add_argument(
        "--compile", nargs="+", choices=["auto", "on", "off"], default=["auto"], help="pdfast: a row each"
    )
    parser.add_argument("--graph", choices=["on", "off"], default="on", help="pdfast: a CUDA graph of the update")
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="pdfast", help="pdfast: whose Adam")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="N", help="pdfast")
    parser.add_argument("--recompute", action="store_true", help="pdfast: activation checkpointing")
    parser.add_argument("--modes", nargs="+", choices=MODES["cuda"], help="of torch.compile: a row each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print providers and variants, and nothing else")
    return parser


def _ceilings(device: torch.device, seconds: float) -> Row:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    rates = {name: peak_flops(device, dtype, seconds) / 1e12 for name, dtype in dtypes.items()}
    return {f"matmul_{name}_tflop_s": rate for name, rate in rates.items()} | {"matmul_tflop_s": max(rates.values())}


def _variants(options: Namespace, device: torch.device, setting: Setting | None, machine: Any) -> list[Variant]:
    """machine: a function that gives that of a value of --compile."""
    chosen = PROVIDERS if "all" in options.providers else options.providers
    modes = options.modes or MODES[device.type]
    found = []
    for provider in chosen:
        match provider:
            case "pdfast":
                ways = {f"compile {c}": lambda c=c: Pdfast(setting, machine(c)) for c in options.compile}
            case "eager":
                ways = {"": partial(rivals.eager, setting)}
            case "compile":
                ways = {mode: partial(rivals.compiled, setting, mode) for mode in modes}
            case _:
                ways = {"eager": partial(rivals.diffusers, setting, None)}
                ways["compile"] = partial(rivals.diffusers, setting, "default")
        found += [Variant({"provider": provider, "variant": way}, build) for way, build in ways.items()]
    return found


def _lacks_memory(options: Namespace, device: torch.device, name: str, batch: int, said: Row, rows: list[Row]) -> bool:
    """Measure all variants at a batch, their rows added to `rows` as they are done; with --halve no more of them, and true,
    once one lacks memory."""
    with open_setting(PRESETS[name], device, batch, _engine(options)) as (setting, machine):
        variants = _variants(options, device, setting, machine)
        for variant in variants:
            variant.row |= {"preset": name, "batch": batch}
        for group in [[v] for v in variants] if device.type == "cuda" else [variants]:
            for variant in group:
                _trying(variant, partial(_prepare, variant, setting))
            for _ in range(TURNS):
                for variant in group:
                    _trying(variant, partial(_time, variant, device, options.seconds / TURNS))
            for variant in group:
                _trying(variant, partial(_conclude, variant, setting, options, said))
                variant.update, variant.build = None, None
                rows.append(variant.row)
                _print(variant.row)
                _write(options, said, rows)
            _free(device)
            if options.halve and any(LACKED in variant.row.get("unavailable", "") for variant in group):
                return True
    return False


def _engine(options: Namespace) -> EngineConfig:
    return EngineConfig(
        dtype=options.dtype,
        graph=options.graph == "on",
        optimizer=options.optimizer,
        micro_batches=options.micro_batches,
        recompute=options.recompute,
    )


def _trying(variant: Variant, part: Callable[[], None]) -> None:
    """A part of the measurement; where it fails, the row says why and the update is let go."""
    if not variant.runs:
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part()
        fallen = [
            str(w.message)
            for w in caught
            if "without a CUDA graph" in str(w.message) or "runs in PyTorch" in str(w.message)
        ]
        if fallen:
            variant.row["fell_back"] = fallen[0]
        return
    except UsageError:
        raise
    except torch.cuda.OutOfMemoryError:
        variant.row["unavailable"] = f"{LACKED} at batch {variant.row['batch']}"
    except Unavailable as reason:
        variant.row["unavailable"] = str(reason)
    except Exception as failure:  # of another provider, of whatever kind
        said = (str(failure).strip().splitlines() or [""])[0][:200]
        variant.row["unavailable"] = f"{type(failure).__name__}: {said}"
    variant.update = None


def _prepare(variant: Variant, setting: Setting) -> None:
    """Build it, run every graph, measure its memory, compare its losses."""
    device = setting.device
    began = time.perf_counter()
    variant.update = update = variant.build()
    update.step()
    peak = peak_mib(lambda: [update.step() for _ in range(WARM_UP - 1)], device, update.tensors())
    seconds = time.perf_counter() - began
    parameters, flops = update.cost
    variant.row.update({"device": device.type, "dtype": update.dtype, "parameters": parameters, "start_s": seconds})
    variant.row.update({"peak_mib": peak, "flops": 5 * flops * setting.config.batch_size})
    teacher, student = update.references()
    update.step()
    batch, losses = update.drawn().first(CHECKED), update.losses[:CHECKED].double()
    with torch.no_grad():
        expected = distillation_losses(teacher, student, batch, setting, torch.float64)
    variant.row["error"] = float((losses - expected).abs().max() / expected.abs().max())
    del teacher, student
    gc.collect()
    print(f"{_title(variant.row)}: ready after {time.perf_counter() - began:.1f} s", flush=True)


def _time(variant: Variant, device: torch.device, seconds: float) -> None:
    variant.elapsed += tuple(clocked(variant.update.step, device, seconds))


def _conclude(variant: Variant, setting: Setting, options: Namespace, said: Row) -> None:
    """The rates, then what changes the update: its stages, and sampling from it."""
    row, update, batch = variant.row, variant.update, setting.config.batch_size
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(variant.elapsed, dtype=torch.float64).quantile(quantiles).tolist()
    rate = row.pop("flops") / median / 1e9
    row |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "updates": len(variant.elapsed)}
    row |= {"images_per_second": 1e3 * batch / median, "tflop_s": rate, "mfu": rate / said["matmul_tflop_s"]}
    stopwatch = Stopwatch(setting.device)
    update.watch(stopwatch.mark)
    row["breakdown_ms"] = stopwatch.medians(update.step, STAGES, WARM_UP, options.seconds / 4)
    if options.sampling:
        row["sampled_images_per_second"] = {}
        for steps in SAMPLING_STEPS:
            update.sample(steps)
            times = sorted(clocked(partial(update.sample, steps), setting.device, options.seconds / 8))
            row["sampled_images_per_second"][str(steps)] = 1e3 * batch / times[len(times) // 2]


def _free(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _title(row: Row) -> str:
    return f"{row['provider']} {row['variant']}".strip()


def _print(row: Row) -> None:
    start = f"{row['preset']:<12} {row['batch']:>5} {_title(row):<36}"
    if "unavailable" in row:
        print(f"{start} unavailable: {row['unavailable']}", flush=True)
        return
    numbers = f"{row['images_per_second']:9.1f} images/s {row['median_ms']:9.2f} ms ({row['p20_ms']:.2f} .. {row['p80_ms']:.2f})"
    numbers += f" {row['tflop_s']:8.3f} TFLOP/s MFU {row['mfu']:6.1%} {row['peak_mib']:9.1f} MiB {row['dtype']:<13}"
    stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in row["breakdown_ms"].items())
    more = f" error {row['error']:.1e}; {stages}"
    for steps, rate in row.get("sampled_images_per_second", {}).items():
        more += f"; {steps}-step sampling {rate:.1f} images/s"
    fell = f"  FELL BACK: {row['fell_back']}" if "fell_back" in row else ""
    print(f"{start} {numbers}{more}{fell}", flush=True)


def _write(options: Namespace, said: Row, rows: list[Row]) -> None:
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.json.write_text(f'{{"header": {json.dumps(said)}, "rows": [\n{lines}\n]}}\n')


def _summary(rows: list[Row]) -> None:
    """The best of pdfast against the best of each of the others."""
    done = [row for row in rows if "unavailable" not in row]
    ours = [row for row in done if row["provider"] == "pdfast"]
    for provider in dict.fromkeys(row["provider"] for row in done if row["provider"] != "pdfast" and ours):
        mine, theirs = (
            max(some, key=lambda row: row["images_per_second"])
            for some in (ours, [row for row in done if row["provider"] == provider])
        )
        speed = mine["images_per_second"] / theirs["images_per_second"]
        print(
            f"pdfast: {speed:.2f}x the images/s of {_title(theirs)}, {mine['peak_mib'] / theirs['peak_mib']:.2f}x its memory"
        )


if __name__ == "__main__":
    sys.exit(main())
