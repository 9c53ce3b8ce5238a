"""What the commands here have in common: their arguments, errors of one line, a result's header and its rows."""

import argparse
import contextlib
import datetime
import json
import math
import platform
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from pdfast.engine.device import commit, describe, open_device
from pdfast.io.errors import UsageError
from pdfast_kernels.runtime import dispatch
from pdfast_kernels.runtime.triton import triton

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


class Unavailable(Exception):
    """Why something cannot be measured here."""


def reason(failure: Exception) -> str:
    """What failed, in one line."""
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(failure, (Unavailable, UsageError)):
        return str(failure)
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:200]}"


@contextlib.contextmanager
def trying(row: Row) -> Iterator[None]:
    """Part of a measurement: where it fails, of whatever kind, the row's `unavailable` says why; where something else ran than was
    asked for, and a warning said so, `fell_back` is that warning."""
    dispatch._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as failure:
            # Why none of its backends runs PyTorch's attention has warned before.
            warned = "No available kernel" in str(failure) and caught
            row["unavailable"] = str(caught[-1].message).partition(" (Triggered")[0] if warned else reason(failure)
    for said in (str(warning.message) for warning in reversed(caught)):
        if "runs in PyTorch" in said or "without a CUDA graph" in said or "fall" in said.lower():
            row["fell_back"] = said


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """An argument that is a time above 0."""
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


class Parser(argparse.ArgumentParser):
    """Exit code 2 and one line for a bad argument."""

    def add_json(self) -> None:
        self.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")

    def add_measuring(self, time: float) -> None:
        """--device, a torch.device once parsed, --seconds and --json."""
        self.add_argument("--device", choices=["cuda", "cpu"], help="a GPU where there is one, unless said")
        self.add_argument("--seconds", type=seconds, default=time, metavar="S", help="for each row")
        self.add_json()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Files that can be written and a device that is there: an error now, not after the measurements."""
        options = self.parse_args(arguments)
        for file in vars(options).values():
            if isinstance(file, Path) and (file.is_dir() or not file.parent.is_dir()):
                self.error(f"{file} is no file that could be written")
        if "device" in options:
            if options.device == "cuda" and not torch.cuda.is_available():
                self.error("--device cuda, but there is no GPU: say --device cpu")
            options.device = open_device(options.device or "auto")
        return options


def header(device: torch.device | None = None) -> Row:
    """Hardware (none for None: nothing ran on a device), versions, commit and date."""
    said = {} if device is None else {"device": describe(device)}
    if device and device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        arch = f"sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} processors, {gpu.total_memory >> 20} MiB"
        said |= {"gpu": arch, "cpu": describe(torch.device("cpu")), "driver": _driver()}
        said |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    said |= {"torch": torch.__version__, "triton": triton.__version__ if triton else "none"}
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return said | {"python": platform.python_version(), "commit": commit() or "unknown", "date": now}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        said = []
    return said[0] if said else "unknown"


class Report:
    """A header and rows: printed as they come, and written to a file after each, so that nothing is lost."""

    def __init__(self, file: Path | None, said: Row, start: str, numbers: str) -> None:
        """start, numbers: formats of what a row is about, and of what was measured."""
        self.said, self.rows = said, list[Row]()
        self._file, self._start, self._numbers = file, start, numbers
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in said.items()}
        print(", ".join(f"{key} {value}" for key, value in shown.items()))

    def add(self, row: Row) -> None:
        """A row; one that has `unavailable` has that reason in place of numbers."""
        self.rows.append(row)
        shown = defaultdict(lambda: math.nan, {name: value for name, value in row.items() if value is not None})
        text = f"unavailable: {row['unavailable']}" if "unavailable" in row else self._numbers.format_map(shown)
        fell = f"  FELL BACK: {row['fell_back']}" if row.get("fell_back") else ""
        print(f"{self._start.format_map(shown)} {text}{fell}", flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        if self._file:
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            rest = "".join(f', "{name}": {json.dumps(value)}' for name, value in more.items())
            self._file.write_text(f'{{"header": {json.dumps(self.said)}, "rows": [\n{lines}\n]{rest}}}\n')
