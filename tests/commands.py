"""Running the commands as a person does, in this process or in one of their own, on a network that trains in milliseconds."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from pdfast.cli import run_command

ROOT = Path(__file__).parents[1]
TINY_NETWORK = (
    "--network.channels 8 --network.channel-mult 1 --network.num-groups 4 --network.head-dim 8 --network.emb-channels 16"
).split()
TINY_RUN = (
    "--device cpu --train.updates 12 --train.batch-size 16 --train.warmup 2 --checkpoint-every 3 --log-every 2 "
    "--evaluation.num-samples 64"
).split() + TINY_NETWORK
TINY_DISTILL = [*TINY_RUN, *"--rounds 2 --updates 10,1:12 --batch-size 16".split()]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def spawn(command: str, *arguments: str, **options) -> subprocess.Popen:
    """Start `python -m pdfast.COMMAND` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"pdfast.{command}", *arguments],
        env=environment(),
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
