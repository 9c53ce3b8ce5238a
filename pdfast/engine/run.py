"""The folder of a run, which the same command run again resumes.

runs/NAME/{config.yaml, log.jsonl, tb/, checkpoints/, teacher/, students/NNNN/, report.html}
"""

import fcntl
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import yaml

from pdfast.config import RunConfig, to_plain, to_yaml
from pdfast.data import ImageSource
from pdfast.engine.files import write_file, writing
from pdfast.engine.model_folder import SavedModel
from pdfast.engine.world import World
from pdfast.errors import UsageError
from pdfast.reading import load_yaml

MAY_CHANGE = {"run", "device", "loader", "max_bad", "log_every", "checkpoint_every", "engine", "guard"}


@contextmanager
def open_run(config: RunConfig, source: ImageSource, world: World, teacher: SavedModel | None = None) -> Iterator[None]:
    """Create the run's folder, or check that it was begun with this configuration, these images and this teacher (where one
    was given); the first process locks it until the end.

    UsageError where the folder can't be written, another run works in it, or a field differs (it is named).
    """
    with ExitStack() as until_the_end:

        def open_folder() -> None:
            with writing(config.run):
                config.run.mkdir(parents=True, exist_ok=True)
                lock = until_the_end.enter_context(open(config.run / ".lock", "w"))
            facts = {"data_sha256": source.fingerprint} | (
                {} if teacher is None else {"teacher_sha256": teacher.weights_sha256()}
            )
            _begin_or_resume(config, facts, lock)

        world.on_first(open_folder)
        yield


def _begin_or_resume(config: RunConfig, facts: dict[str, str], lock: IO[str]) -> None:
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
        _refuse_changes(before, to_plain(config) | facts, config.run)
    else:
        write_file(saved, to_yaml(config) + yaml.safe_dump({"command": _command()} | facts, width=10_000))


def _command() -> str:
    """The command line as a person would type it."""
    main = sys.modules["__main__"].__spec__
    return shlex.join(["python", "-m", main.name, *sys.argv[1:]] if main else ["python", *sys.argv])


def _refuse_changes(before: dict, now: dict, run: Path, prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        path = f"{prefix}{name}"
        old, new = before.get(name), now.get(name)
        if path in MAY_CHANGE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_changes(old, new, run, f"{path}.")
        elif old != new:
            raise UsageError(
                f"{run} was begun with {path} = {old}, now it is {new}: give the same value, or choose another folder with --run"
            )
