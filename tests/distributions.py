"""Building the distributions as for a release, from a copy of the repository without what does not belong to it."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.commands import ROOT

LEFT_OUT = (".venv", ".git", "runs", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")


def copied(folder: Path) -> Path:
    """Copy the repository into the folder; returns where it is."""
    return Path(shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT)))


def build(project: Path, out: Path, *flags: str) -> None:
    """Build a project's distributions, or those that the flags of `python -m build` choose, into a folder."""
    command = [sys.executable, "-m", "build", *flags, "--outdir", str(out), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
