"""`python -m benchmarks.resume`: a run of two rounds that is killed in the second, goes on, and ends.

`pdfast.distill` on --data, or on random images (judged then by an untrained Inception network: the distances mean
nothing). In the last round, past a checkpoint, its process gets SIGKILL, or SIGTERM; the same command must then resume that
round, and end with both students and the report. Any other flag is handed to it. Exit code 1, and why, where it did not.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.arguments import Parser
from benchmarks.header import ROOT, header
from pdfast.config import DistillConfig
from pdfast.engine.device import open_device
from pdfast.presets import PRESETS
from pdfast.report.inception import InceptionV3

UPDATES, CHECKPOINT_EVERY = 60, 20
KILLED_AT = 31  # or later: a checkpoint is behind it, and the end is not yet
PATIENCE = 400.0  # seconds
NUM_IMAGES = 2048


class Failed(Exception):
    """Why the run is not as it must be."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.resume", description="A run of two rounds that is killed in the second and goes on.")
    parser.add_argument("--preset", choices=PRESETS, default="cifar10-fast")
    parser.add_argument("--data", help="of pdfast.distill; random images unless said")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--kill", choices=["SIGKILL", "SIGTERM"], default="SIGKILL")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    parser.check_writable(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU: say --device cpu")
    device = open_device(options.device or "auto")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            row = _killed_and_resumed(_command(options, device, folder, others), folder / "run", options.kill)
        except Failed as failure:
            print(f"benchmarks.resume: {failure}", file=sys.stderr)
            return 1
    row = {"preset": options.preset, "device": device.type, "signal": options.kill} | row
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"header": header(device), "rows": [row]}, indent=1) + "\n")
    return 0


def _command(options: Any, device: torch.device, folder: Path, others: list[str]) -> list[str]:
    preset = PRESETS[options.preset]
    flags = (
        f"--preset {preset.preset} --device {device.type} --run {folder / 'run'} --rounds 2 --updates {UPDATES} "
        f"--train.updates {UPDATES} --checkpoint-every {CHECKPOINT_EVERY} --log-every 1 --batch-size 64 "
        f"--train.batch-size 64 --train.warmup 10 --evaluation.num-samples 256 --data "
    ).split()
    if options.data:
        return [sys.executable, "-m", "pdfast.distill", *flags, options.data, *others]
    return [sys.executable, "-m", "pdfast.distill", *flags, *random_data(preset, folder), *others]


def random_data(preset: DistillConfig, folder: Path) -> list[str]:
    """The value of --data of `pdfast.distill`, and the flags of a feature space that needs no download."""
    size, channels = preset.network.image_size, preset.network.image_channels
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, size, size, channels), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    if preset.evaluation.features == "digits":
        return [str(folder / "images.npz")]
    torch.manual_seed(0)
    save_file(InceptionV3().state_dict(), folder / "untrained.safetensors")
    return [str(folder / "images.npz"), "--evaluation.features", str(folder / "untrained.safetensors")]


def _killed_and_resumed(command: list[str], run: Path, kill: str) -> dict[str, Any]:
    began = time.perf_counter()
    with open(run.with_suffix(".out"), "w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and (update := _last_update(run)) < KILLED_AT:
            if time.perf_counter() - began > PATIENCE:
                process.kill()
                raise Failed(f"not in its last round after {PATIENCE:.0f} s")
            time.sleep(0.02)
        if process.poll() is not None:
            said.seek(0)
            raise Failed(f"ended with {process.returncode} before it was killed: {said.read()[-500:]}")
        process.send_signal(getattr(signal, kill))
        code = process.wait()
    before = time.perf_counter() - began
    if (run / "students/0001").exists() or not (run / "students/0002").exists():
        raise Failed("was not killed in its last round")
    again = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if again.returncode:
        raise Failed(f"the resumed run ended with {again.returncode}: {again.stdout[-500:]}")
    resumed = [line for line in again.stdout.splitlines() if "resuming the round to 1 step at update " in line]
    if not resumed:
        raise Failed("did not resume the round: it began it again")
    updates = [entry["update"] for entry in _log(run) if entry.get("steps") == 1 and "update" in entry]
    if updates != list(range(1, UPDATES + 1)):
        raise Failed(f"updates are missing or twice in its log: {updates}")
    for made in ("students/0001/student.safetensors", "students/0002/student.safetensors", "report.html"):
        if not (run / made).exists():
            raise Failed(f"ended without {made}")
    return {
        "killed_at": update,
        "exit_code": code,
        "resumed_at": int(resumed[0].rsplit(" ", 1)[1]),
        "seconds_until_killed": round(before, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "report_bytes": (run / "report.html").stat().st_size,
    }


def _log(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's log that are whole."""
    entries = []
    for line in (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:  # being written
            continue
    return entries


def _last_update(run: Path) -> int:
    """Of the last round; 0 before it."""
    return max((entry["update"] for entry in _log(run) if entry.get("steps") == 1 and "update" in entry), default=0)


if __name__ == "__main__":
    sys.exit(main())
