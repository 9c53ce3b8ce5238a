"""Several processes of a run on one machine, by torchrun, as a person starts them."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.commands import environment

TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent))


def start(processes: int, *arguments: str, torchrun: tuple[str, ...] = ("--standalone",), **variables: str):
    """`torchrun ... -m pdfast.distill ...`, or of a script, as a process of its own with its output in one pipe."""
    command = [TORCHRUN, *torchrun, "--nproc-per-node", str(processes), *arguments]
    return subprocess.Popen(
        command, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(processes: int, *arguments: str, timeout: float = 300, **options) -> str:
    """It, to its end; returns what it said. AssertionError unless it ended well."""
    process = start(processes, *arguments, **options)
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, text[-3000:]
    return text
