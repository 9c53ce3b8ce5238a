"""The folder of a run, which the same command run again resumes.

runs/NAME/{config.yaml, log.jsonl, tb/, checkpoints/, teacher/, students/NNNN/, report.html}
"""

import fcntl
import shlex
import sys
from pathlib import Path
from typing import IO

import yaml

from pdfast.config import RunConfig, load_yaml, to_plain, to_yaml
from pdfast.data import ImageSource
from pdfast.engine.files import write_file, writing
from pdfast.errors import UsageError

MAY_CHANGE = {"run", "device", "log_every", "checkpoint_every"}


def open_run(config: RunConfig, source: ImageSource) -> IO[str]:
    """Create the run's folder, or check that it was begun with this configuration and these images; returns a lock to hold
    until the end.

    UsageError where the folder can't be written, another process works in it, or a field differs (it is named).
    """
    run = config.run
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
    try:
        _begin_or_resume(config, source, lock)
    except BaseException:
        lock.close()
        raise
    return lock


def _begin_or_resume(config: RunConfig, source: ImageSource, lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"another process is working in {config.run}; wait for it, or choose another folder with --run"
        ) from None
    saved = config.run / "config.yaml"
    if saved.exists():
        before = load_yaml(saved)
        before.pop("command", None)
        _refuse_changes(before, to_plain(config) | {"data_sha256": source.fingerprint}, config.run)
    else:
        facts = {"command": _command(), "data_sha256": source.fingerprint}
        write_file(saved, to_yaml(config) + yaml.safe_dump(facts, width=10_000))


def _command() -> str:
    """The command line as a person would type it."""
    main = sys.modules["__main__"].__spec__
    return shlex.join(["python", "-m", main.name, *sys.argv[1:]] if main else ["python", *sys.argv])


def _refuse_changes(before: dict, now: dict, run: Path, prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        path = f"{prefix}{name}"
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_changes(old, new, run, f"{path}.")
        elif old != new and path not in MAY_CHANGE:
            raise UsageError(
                f"{run} was begun with {path} = {old}, now it is {new}: give the same value, or choose another folder with --run"
            )
