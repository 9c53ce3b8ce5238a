"""What a run says while it runs: log.jsonl, TensorBoard, and a progress bar (plain lines where there is no terminal)."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pdfast.engine.files import write_file, writing

PLAIN_LINE_EVERY_SECONDS = 10.0


class RunLog:
    """log.jsonl, TensorBoard and the console of one run."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "log.jsonl"
        with writing(self.path):
            self._file = open(self.path, "a")
            self.board = SummaryWriter(str(run / "tb"))

    def say(self, message: str) -> None:
        """A line for the console alone."""
        tqdm.write(f"pdfast: {message}", file=sys.stdout)
        sys.stdout.flush()

    def record(self, entry: dict[str, Any]) -> None:
        """One JSON line."""
        with writing(self.path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def warn(self, message: str) -> None:
        """A warning on the console and in the log, from where the report takes it."""
        self.say(f"warning: {message}")
        self.record({"event": "warning", "message": message})

    def forget_after(self, steps: int | None, update: int) -> None:
        """Drop the log lines of this stage past `update`: they belong to updates that will be made again."""
        self._file.close()
        lines = self.path.read_text().splitlines(keepends=True)
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if not ("update" in entry and entry["steps"] == steps and entry["update"] > update):
                kept.append(line)
        write_file(self.path, "".join(kept))
        with writing(self.path):
            self._file = open(self.path, "a")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self.board.close()


class Progress:
    """Progress of one stage: averages the loss between log lines, and counts time over resumes."""

    def __init__(
        self,
        log: RunLog,
        *,
        phase: str,
        steps: int | None,
        start: int,
        updates: int,
        seconds: float,
        batch_size: int,
        every: int,
    ) -> None:
        self._log, self._phase, self._steps = log, phase, steps
        self._updates, self._batch_size, self._every = updates, batch_size, every
        self._seconds_before, self._began = seconds, time.perf_counter()
        self._first = self._window_start = start
        self._window_began = self._last_line = self._began
        self._losses: list[Tensor] = []
        name = "teacher" if steps is None else count_steps(steps)
        self._bar = tqdm(
            total=updates, initial=start, desc=name, unit="update", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        self._name = name

    @property
    def seconds(self) -> float:
        """Seconds spent in this stage, over all resumes."""
        return self._seconds_before + time.perf_counter() - self._began

    def update(self, done: int, loss: Tensor, norm: Tensor, learning_rate: float) -> None:
        """Report that `done` updates are done; writes a log line every `every` updates and after the last."""
        self._losses.append(loss.detach())
        self._bar.update(1)
        if done % self._every and done != self._updates:
            return
        now = time.perf_counter()
        mean = float(torch.stack(self._losses).mean())
        rate = (done - self._window_start) * self._batch_size / (now - self._window_began)
        left = (self._updates - done) * (now - self._began) / (done - self._first)
        entry = {
            "phase": self._phase,
            "steps": self._steps,
            "update": done,
            "updates": self._updates,
            "loss": mean if mean == mean and abs(mean) != float("inf") else None,
            "grad_norm": float(norm) if bool(torch.isfinite(norm)) else None,
            "learning_rate": learning_rate,
            "images": done * self._batch_size,
            "images_per_second": round(rate, 1),
            "seconds": round(self.seconds, 3),
        }
        self._log.record(entry)
        tag = "teacher" if self._steps is None else f"round_{self._steps:04d}"
        for key in ("loss", "grad_norm", "learning_rate", "images_per_second"):
            if entry[key] is not None:
                self._log.board.add_scalar(f"{tag}/{key}", entry[key], done)
        self._bar.set_postfix_str(f"loss {mean:.3g}, {rate:.0f} images/s")
        if self._bar.disable and (now - self._last_line > PLAIN_LINE_EVERY_SECONDS or done == self._updates):
            self._log.say(
                f"{self._name}: update {done}/{self._updates}, loss {mean:.3g}, {rate:.0f} images/s, {clock(left)} left"
            )
            self._last_line = now
        self._losses, self._window_start, self._window_began = [], done, now

    def close(self) -> None:
        self._bar.close()


def count_steps(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def clock(seconds: float) -> str:
    """1:05 or 2:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
