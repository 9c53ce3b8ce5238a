"""`python -m benchmarks.safety`: what checkpoints and logging cost a run, as shares of its training time.

A short real run of `pdfast.distill`, one round from random weights, on the built-in digits or on random images (any other
flag is handed to it). Counted is the time that the training loop spends in saving checkpoints and in progress, log and
TensorBoard, the device idle at the start of each, and, on a CPU, which the writer of checkpoints shares with the training,
the writer's processor time; the run's time is that of its updates past the first quarter, in which it compiles. Both are at
the preset's own intervals; a run too short for two checkpoints saves more often, and their share is taken down to that
interval. Exit code 1 where checkpoints take more than 2 %, or logging more than 1 %.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.arguments import Parser
from benchmarks.header import header
from benchmarks.resume import random_data
from pdfast.cli import run_command
from pdfast.distill import main as distill
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.device import open_device
from pdfast.engine.log import Progress
from pdfast.presets import PRESETS

MOST = {"checkpoints": 0.02, "logging": 0.01}


class Spent:
    """Seconds in functions that a training loop calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def counted(self, function: Callable[..., Any], waits: Callable[..., bool]) -> Callable[..., Any]:
        """waits: whether a call with these arguments would wait for the device, which is not its cost."""

        def run(*arguments: Any, **options: Any) -> Any:
            if self._depth:  # one of the others called it
                return function(*arguments, **options)
            if self._device.type == "cuda" and waits(*arguments):
                torch.cuda.synchronize()
            began = time.perf_counter()
            self._depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                self.seconds += time.perf_counter() - began
                self.calls += 1

        return run


@contextmanager
def counted(device: torch.device) -> Iterator[tuple[dict[str, Spent], dict[int, float]]]:
    """What is spent within the block: in checkpoints, logging, and the writer's thread (its processor time); and when the
    first quarter of the round and its end were reached, by update."""
    moments: dict[int, float] = {}
    spent = {name: Spent(device) for name in ("checkpoints", "logging", "writer")}
    write, update = Checkpoints._write, Progress.update

    def timed_write(*arguments: Any) -> None:
        began = time.thread_time()
        write(*arguments)
        if threading.current_thread() is not threading.main_thread():
            spent["writer"].seconds += time.thread_time() - began
            spent["writer"].calls += 1

    def reads(progress: Progress, done: int, *_: object) -> bool:
        return done % progress._every == 0 or done == progress._updates

    logged = spent["logging"].counted(update, reads)

    def timed_update(progress: Progress, done: int, learning_rate: float) -> None:
        logged(progress, done, learning_rate)
        if progress._steps is not None and done in (max(progress._updates // 4, 1), progress._updates):
            if device.type == "cuda":
                torch.cuda.synchronize()
            moments[done] = time.perf_counter()

    with (
        mock.patch.object(Checkpoints, "save", spent["checkpoints"].counted(Checkpoints.save, lambda *_: True)),
        mock.patch.object(Checkpoints, "poll", spent["checkpoints"].counted(Checkpoints.poll, lambda *_: False)),
        mock.patch.object(Checkpoints, "finish", spent["checkpoints"].counted(Checkpoints.finish, lambda *_: False)),
        mock.patch.object(Checkpoints, "_write", timed_write),
        mock.patch.object(Progress, "update", timed_update),
    ):
        yield spent, moments


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.safety", description="What checkpoints and logging cost a run.")
    parser.add_argument("--preset", choices=PRESETS, help="cifar10-fast on a GPU, digits on a CPU unless said")
    parser.add_argument(
        "--updates", type=int, metavar="N", help="of the round; two intervals of checkpoints unless said"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    parser.check_writable(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU: say --device cpu")
    if options.updates is not None and options.updates < 2:
        parser.error("--updates is at least 2")
    device = open_device(options.device or "auto")
    preset = PRESETS[options.preset or ("cifar10-fast" if device.type == "cuda" else "digits")]
    updates = options.updates or 2 * preset.checkpoint_every
    with tempfile.TemporaryDirectory() as folder:
        run, every = Path(folder) / "run", min(preset.checkpoint_every, updates // 2)
        flags = f"--preset {preset.preset} --rounds 1 --updates {updates} --device {device.type} --run {run}"
        flags += f" --train.updates 2 --train.warmup 1 --checkpoint-every {every} --evaluation.num-samples 256"
        if preset.data != "digits":
            others = ["--data", *random_data(preset, Path(folder)), *others]
        with (
            mock.patch.object(sys, "argv", ["pdfast.distill", *flags.split(), *others]),
            counted(device) as (spent, moments),
        ):
            try:
                run_command(distill)
            except SystemExit as end:
                if end.code:
                    return int(end.code)
    (first, began), (last, ended) = sorted(moments.items())
    seconds = (ended - began) / (last - first) * updates
    row = {"preset": preset.preset, "device": device.type, "updates": updates, "seconds": seconds}
    row |= {"checkpoint_every": every, "checkpoint_every_of_preset": preset.checkpoint_every}
    for name, place in spent.items():
        row |= {f"{name}_calls": place.calls, f"{name}_seconds": place.seconds}
    beside = spent["writer"].seconds if device.type == "cpu" else 0.0
    shares = {
        "checkpoints": (spent["checkpoints"].seconds + beside) / seconds * every / preset.checkpoint_every,
        "logging": spent["logging"].seconds / seconds,
    }
    row |= {f"{name}_share": share for name, share in shares.items()}
    print(
        ", ".join(f"{name} {share:.2%} of {seconds:.1f} s (at most {MOST[name]:.0%})" for name, share in shares.items())
    )
    if options.json:
        options.json.write_text(json.dumps({"header": header(device), "rows": [row]}, indent=1) + "\n")
    return int(any(share > MOST[name] for name, share in shares.items()))


if __name__ == "__main__":
    sys.exit(main())
