"""What a run says while it runs: log.jsonl, TensorBoard, and a progress bar (plain lines where there is no terminal).

The first process alone writes; in the others all this is silent.
"""

import contextlib
import json
import re
import sys
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdfast.data import ImageSource
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.board import Board
from pdfast.engine.optimizer import Optimizer
from pdfast.engine.pace import Pace, Slowness, likely_cause
from pdfast.engine.throughput import Losses, Speed, peak_memory_mib
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from pdfast.io.files import write_file, writing
from pdfast.io.reading import parse_json
from pdfast.io.run_folder import RunFolder
from pdfast.io.text import clock, count_steps

PLAIN_LINE_EVERY_SECONDS = 10.0
LINES = 8  # that a stage has at least, where it has as many updates: a curve of it can be drawn
SCALARS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "images_per_second",
    "network_evaluations_per_second",
    "update_seconds",
    "data_wait",
    "model_flop_utilisation",
    "peak_memory_mib",
    "skipped",
)


CHECKSUM = re.compile(rb', "crc32": (\d{1,10})}\n?$')
"""The end of a line: the CRC-32 of the line as it would be without."""


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return text[:-1] + b', "crc32": %d}\n' % zlib.crc32(text)


def read_log(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a log.jsonl with what they say. What is no line of a log, or does not have its checksum, is left
    out with a warning, a last one that was cut off by a kill without; UsageError where the file is none that can be read."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file: move it away")
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    read = [(line, _entry(line)) for line in lines if line.endswith(b"\n")]
    damaged = [number for number, (_, entry) in enumerate(read, 1) if entry is None]
    if damaged:
        others = f", as {len(damaged) - 1} more are" if damaged[1:] else ""
        warnings.warn(f"{path}, line {damaged[0]} is damaged and left out{others}", stacklevel=2)
    return [(line, entry) for line, entry in read if entry is not None]


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None where that is nothing that a run writes. Those of earlier versions have no checksum."""
    if (checksum := CHECKSUM.search(line)) and int(checksum[1]) != zlib.crc32(line[: checksum.start()] + b"}"):
        return None
    try:
        entry = parse_json(line.decode())
    except ValueError:
        return None
    if not isinstance(entry, dict) or not _is_number(entry.get("steps"), int) or entry.get("steps") == 0:
        return None
    entry.pop("crc32", None)
    if "event" in entry:
        texts = {"event", *({"warning": ["message"], "bad image": ["name"]}.get(str(entry["event"]), []))}
        return entry if all(isinstance(entry.get(name), str) for name in texts) and "update" not in entry else None
    losses = entry.get("loss_by_step") or []
    numbers = [entry.get(name) for name in (*SCALARS, "seconds", "images")]
    numbers += losses if isinstance(losses, list) else [losses]
    whole = isinstance(losses, list) and "steps" in entry and type(entry.get("update")) is int and entry["update"] > 0
    return entry if whole and all(_is_number(number, float) for number in numbers) else None


def _is_number(value: Any, kind: type) -> bool:
    """Tell whether it is a whole number (`int`), or any (`float`), from 0 on, or None."""
    return value is None or (type(value) in (int, kind) and value >= 0)


class RunLog:
    """log.jsonl, TensorBoard and the console of one run."""

    def __init__(self, run: Path, world: World) -> None:
        folder = RunFolder(run)
        self.path, self.is_rank0, self._world = folder.log, world.is_rank0, world
        self._source: ImageSource | None = None
        self._exchanged: set[str] = set()
        self._paces: dict[str, Pace] = {}
        self._slowness_said = False
        self._recorded: set[str] = set()
        """Names of the bad images that have a line."""
        if self.is_rank0:
            lines = read_log(self.path)
            self._recorded = {
                entry["name"] for _, entry in lines if entry.get("event") == "bad image" and "name" in entry
            }
            self._keep(line for line, _ in lines)
            self._board = Board(folder.tensorboard)

    def say(self, message: str) -> None:
        """A line for the console alone."""
        if self.is_rank0:
            tqdm.write(f"pdfast: {message}", file=sys.stdout)
            sys.stdout.flush()

    def record(self, entry: dict[str, Any]) -> None:
        """One JSON line."""
        if self.is_rank0:
            with writing(self.path):
                self._file.write(_line(entry))
                self._file.flush()

    def watch(self, source: ImageSource) -> None:
        """From now on each image that cannot be used is a line, and so are those that were found before; one line for each,
        however often the run is resumed."""

        def record(name: str, reason: str) -> None:
            if name not in self._recorded:
                self._recorded.add(name)
                self.record({"event": "bad image", "name": name, "reason": reason})

        for name, reason in source.bad.reasons.items():
            record(name, reason)
        self._source, source.bad.on_new = source, record

    def exchange_bad_images(self) -> None:
        """All processes come to know of the images that any could not use. All must call it."""
        if self._source is None:
            return
        bad = self._source.bad
        found = {name: reason for name, reason in bad.reasons.items() if name not in self._exchanged}
        if self._world.any(bool(found))[0]:
            for of_one in self._world.collect(found):
                self._exchanged |= of_one.keys()
                bad.add(of_one)

    def count_bad_images(self) -> None:
        """A line for the console, where there were any. All processes must call it."""
        self.exchange_bad_images()
        if self._source is not None and self._source.bad.reasons:
            number, of = len(self._source.bad.reasons), self._source.num_images
            self.say(f"{number} of {of} images could not be used, and the next were instead: see {self.path}")

    def warn(self, message: str, steps: int | None = None) -> None:
        """A warning on the console and in the log, from where the report takes it; steps: of which stage it is."""
        self.say(f"warning: {message}")
        self.record({"event": "warning", "steps": steps, "message": message})

    def pace(self, phase: str) -> Pace:
        """Return the pace of all stages of a phase, whose updates cost the same."""
        return self._paces.setdefault(phase, Pace())

    def warn_of_slowness(self, slowness: Slowness, steps: int | None) -> None:
        """Once a run."""
        if not self._slowness_said:
            cause = likely_cause(slowness, self._world.device)
            self.warn(f"for a minute an update has taken {slowness.times:.1f} times as long as before: {cause}", steps)
        self._slowness_said = True

    def scalars(self, tag: str, values: dict[str, float | None], update: int) -> None:
        """Numbers for TensorBoard."""
        if self.is_rank0:
            for name, value in values.items():
                if value is not None:
                    self._board.scalar(f"{tag}/{name}", value, update)

    def images(self, images: Any, steps: int) -> None:
        """Samples, uint8 [n, H, W, C], of a model at a step count, for TensorBoard."""
        if self.is_rank0:
            self._board.images("samples", images, steps)

    def forget_after(self, steps: int | None, update: int) -> None:
        """Drop the log lines of this stage past `update`, and its warnings: they belong to what will be done again."""
        if not self.is_rank0:
            return
        self._file.close()

        def stays(entry: dict[str, Any]) -> bool:
            of_stage = "event" not in entry or "steps" in entry
            return not of_stage or entry.get("steps") != steps or entry.get("update", update + 1) <= update

        self._keep(line for line, entry in read_log(self.path) if stays(entry))

    def _keep(self, lines: Iterable[bytes]) -> None:
        """Go on after these lines of the file."""
        write_file(self.path, b"".join(lines))
        with writing(self.path):
            self._file = open(self.path, "ab")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_rank0:
            with contextlib.suppress(OSError):  # what could not be written was said when it was
                self._file.close()
            self._board.close()


class Progress:
    """Progress of one stage: reads the sums of losses for each log line, and counts time over resumes."""

    def __init__(
        self,
        log: RunLog,
        losses: Losses,
        speed: Speed,
        optimizer: Optimizer,
        batch: TrainingBatch,
        *,
        phase: str,
        steps: int | None,
        start: int,
        updates: int,
        seconds: float,
        every: int,
    ) -> None:
        """every: updates between log lines, fewer in a stage that would have less than `LINES`."""
        self._log, self._losses, self._speed, self._optimizer, self._batch = log, losses, speed, optimizer, batch
        self._phase, self._steps, self._updates, self._every = (
            phase,
            steps,
            updates,
            min(every, max(1, -(-updates // LINES))),
        )
        self._seconds_before, self._began, self._start = seconds, time.perf_counter(), start
        self._last_line = self._began
        speed.start(start, batch.waited)
        self._pace = log.pace(phase)
        self._pace.start(batch.waited)
        self.name = "teacher" if steps is None else count_steps(steps)
        silent = not (log.is_rank0 and sys.stderr.isatty())
        self._bar = tqdm(
            total=updates, initial=start, desc=self.name, unit="update", disable=silent, dynamic_ncols=True
        )

    @property
    def seconds(self) -> float:
        """Seconds spent in this stage, over all resumes."""
        return self._seconds_before + time.perf_counter() - self._began

    def update(self, done: int, learning_rate: float) -> None:
        """Report that `done` updates are done; writes a log line now and then, and after the last."""
        self._bar.update(1)
        if slowness := self._pace.update(self._batch.waited):
            self._log.warn_of_slowness(slowness, self._steps)
        if done % self._every and done != self._updates:
            return
        loss, by_step = self._losses.read()
        rates = self._speed.read(done, self._batch.waited)
        norm = float(self._optimizer.norm)
        entry: dict[str, Any] = {
            "phase": self._phase,
            "steps": self._steps,
            "update": done,
            "updates": self._updates,
            "loss": _finite(loss),
            "loss_by_step": by_step,
            "grad_norm": _finite(norm),
            "learning_rate": learning_rate,
            "images": done * self._speed.batch_size,
            "seconds": round(self.seconds, 3),
            "skipped": int(self._optimizer.skipped[0]),
            "peak_memory_mib": round(peak_memory_mib(self._optimizer.norm.device), 1),
            **rates,
        }
        self._log.record(entry)
        self._log.exchange_bad_images()
        tag = "teacher" if self._steps is None else f"round_{self._steps:04d}"
        self._log.scalars(tag, {name: entry[name] for name in SCALARS}, done)
        self._say(done, loss, rates)

    def _say(self, done: int, loss: float, rates: dict[str, float]) -> None:
        rate = (
            f"loss {loss:.3g}, {rates['images_per_second']:.0f} images/s, "
            f"{rates['update_seconds'] * 1e3:.3g} ms an update, MFU {rates['model_flop_utilisation']:.0%}"
        )
        self._bar.set_postfix_str(rate)
        now = time.perf_counter()
        if self._bar.disable and (now - self._last_line > PLAIN_LINE_EVERY_SECONDS or done == self._updates):
            left = (self._updates - done) * (now - self._began) / (done - self._start)
            self._log.say(f"{self.name}: update {done}/{self._updates}, {rate}, {clock(left)} left")
            self._last_line = now

    def close(self) -> None:
        self._bar.close()


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
