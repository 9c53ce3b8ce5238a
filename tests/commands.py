"""Running the commands as a person does, in this process or in one of their own, on a network that trains in milliseconds."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from pdfast.cli import run_command
from pdfast.io.files import check_seal, sealed

ROOT = Path(__file__).parents[1]
TINY_NETWORK = (
    "--network.channels 8 --network.channel-mult 1 --network.num-groups 4 --network.head-dim 8 --network.emb-channels 16"
).split()
TINY_GIVEN = "--device cpu --checkpoint-every 3 --log-every 2 --evaluation.num-samples 64".split()
"""Of a run whose teacher is given."""
TINY_RUN = [*TINY_GIVEN, *"--train.updates 12 --train.batch-size 16 --train.warmup 2".split(), *TINY_NETWORK]
TINY_ROUNDS = "--rounds 2 --updates 10,1:12 --batch-size 16 --method progressive --learning-rate 5e-4".split()
TINY_DISTILL = [*TINY_RUN, *TINY_ROUNDS]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def spawn(command: str, *arguments: str, path: str | None = None, **options) -> subprocess.Popen:
    """Start `python -m pdfast.COMMAND` as a process of its own. path: its PYTHONPATH instead of the usual one."""
    return subprocess.Popen(
        [sys.executable, "-m", f"pdfast.{command}", *arguments],
        env=environment() | ({"PYTHONPATH": path} if path else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def call(command: str, *arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    argv = sys.argv
    sys.argv = [f"pdfast.{command}", *arguments]
    try:
        run_command(import_module(f"pdfast.{command}").main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv


def rewrite_config(folder: Path, **values) -> None:
    """Change fields of a model's config.json, and its checksum with them, as a program would that writes it whole."""
    file = folder / "config.json"
    file.write_text(json.dumps(sealed(check_seal(json.loads(file.read_text())) | values)))


def one_line(capsys, code, expected_code, *words):
    """The command ended with the code, and its last line on stderr, the only one, says the words."""
    error = capsys.readouterr().err
    assert code == expected_code, error
    assert "Traceback" not in error
    (line,) = [text for text in error.splitlines() if text.startswith("pdfast: error:")]
    for word in words:
        assert word in line, line
