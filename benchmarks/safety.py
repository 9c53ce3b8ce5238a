"""`python -m benchmarks.safety`: what checkpoints and logging cost a run, as shares of its training time.

A short real run of `pdfast.distill`, one round from random weights, on the built-in digits or on random images (any other
flag is handed to it). Counted is the time that the training loop spends in saving checkpoints and in progress, log and
TensorBoard, the device idle at the start of each, and, on a CPU, which the writer of checkpoints shares with the training,
the writer's processor time; the run's time is that of its updates past the first quarter, in which it compiles. Both are at
the preset's own intervals; a run too short for two checkpoints saves more often, and their share is taken down to that
interval. Exit code 1 where checkpoints take more than 2 %, or logging more than 1 %.
"""

import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.command import Parser, Report, count, header
from pdfast.cli import run_command
from pdfast.config import DistillConfig
from pdfast.distill import main as distill
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.log import Progress
from pdfast.presets import PRESETS
from pdfast.report.inception import InceptionV3

MOST = {"checkpoints": 0.02, "logging": 0.01}
WAITS = {"save": True, "poll": False, "finish": False}
"""The parts of a checkpoint that the loop calls, and whether one would wait for the device, which is not its cost."""


@contextmanager
def counted(device: torch.device) -> Iterator[tuple[Counter[str], Counter[str], dict[int, float]]]:
    """Of what is within the block: seconds and calls of checkpoints, logging, and the writer's thread (its processor time);
    and the moments at which the first quarter of the round and its end were reached, by update."""
    seconds, calls, moments, open_calls = Counter[str](), Counter[str](), dict[int, float](), list[str]()

    def timed(name: str, function: Callable[..., Any], waits: bool, clock: Callable[[], float]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if name in open_calls or (name == "writer" and threading.current_thread() is threading.main_thread()):
                return function(*arguments, **options)
            if waits and device.type == "cuda":
                torch.cuda.synchronize()
            open_calls.append(name)
            began = clock()
            try:
                return function(*arguments, **options)
            finally:
                seconds[name] += clock() - began
                calls[name] += 1
                open_calls.remove(name)

        return run

    plain, logged = (timed("logging", Progress.update, waits, time.perf_counter) for waits in (False, True))

    def update(progress: Progress, done: int, learning_rate: float) -> None:
        reads = done % progress._every == 0 or done == progress._updates
        (logged if reads else plain)(progress, done, learning_rate)
        if progress._steps is not None and done in (max(progress._updates // 4, 1), progress._updates):
            if device.type == "cuda":
                torch.cuda.synchronize()
            moments[done] = time.perf_counter()

    with ExitStack() as patches:
        for name, waits in WAITS.items():
            own = timed("checkpoints", getattr(Checkpoints, name), waits, time.perf_counter)
            patches.enter_context(mock.patch.object(Checkpoints, name, own))
        written = timed("writer", Checkpoints._write, False, time.thread_time)
        patches.enter_context(mock.patch.object(Checkpoints, "_write", written))
        patches.enter_context(mock.patch.object(Progress, "update", update))
        yield seconds, calls, moments


def random_data(preset: DistillConfig, folder: Path) -> list[str]:
    """--data of random images, judged by an untrained Inception network, which needs no download."""
    size, channels = preset.network.image_size, preset.network.image_channels
    images = np.random.default_rng(0).integers(0, 256, (2048, size, size, channels), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    torch.manual_seed(0)
    save_file(InceptionV3().state_dict(), folder / "untrained.safetensors")
    return ["--data", str(folder / "images.npz"), "--evaluation.features", str(folder / "untrained.safetensors")]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.safety", description="What checkpoints and logging cost a run.")
    parser.add_argument("--preset", choices=PRESETS, help="cifar10-fast on a GPU, digits on a CPU unless said")
    parser.add_argument(
        "--updates", type=count, metavar="N", help="of the round; two intervals of checkpoints unless said"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    device = parser.checked(options).device
    if options.updates == 1:
        parser.error("--updates is at least 2")
    preset = PRESETS[options.preset or ("cifar10-fast" if device.type == "cuda" else "digits")]
    updates = options.updates or 2 * preset.checkpoint_every
    with tempfile.TemporaryDirectory() as folder:
        run, every = Path(folder) / "run", min(preset.checkpoint_every, updates // 2)
        flags = f"--preset {preset.preset} --rounds 1 --updates {updates} --device {device.type} --run {run}"
        flags += f" --train.updates 2 --train.warmup 1 --checkpoint-every {every} --evaluation.num-samples 256"
        data = [] if preset.data == "digits" else random_data(preset, Path(folder))
        argv = ["pdfast.distill", *flags.split(), *data, *others]
        with mock.patch.object(sys, "argv", argv), counted(device) as (seconds, calls, moments):
            try:
                run_command(distill)
            except SystemExit as end:
                if end.code:
                    return int(end.code)
    (first, began), (last, ended) = sorted(moments.items())
    whole = (ended - began) / (last - first) * updates
    row = {"preset": preset.preset, "device": device.type, "updates": updates, "seconds": whole}
    row |= {"checkpoint_every": every, "checkpoint_every_of_preset": preset.checkpoint_every}
    for name in ("checkpoints", "logging", "writer"):
        row |= {f"{name}_calls": calls[name], f"{name}_seconds": seconds[name]}
    saved = seconds["checkpoints"] + (seconds["writer"] if device.type == "cpu" else 0.0)
    shares = {"checkpoints": saved / whole * every / preset.checkpoint_every, "logging": seconds["logging"] / whole}
    row |= {f"{name}_share": share for name, share in shares.items()}
    limits = ", ".join(f"{name} {{{name}_share:.2%}} (at most {most:.0%})" for name, most in MOST.items())
    Report(options.json, header(device), "{preset}, {seconds:.1f} s:", limits).add(row)
    return int(any(share > MOST[name] for name, share in shares.items()))


if __name__ == "__main__":
    sys.exit(main())
