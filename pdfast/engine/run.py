"""Beginning a run in its folder, or going on with the one that is there."""

import dataclasses
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import IO, Any

import yaml

from pdfast.config import RunConfig, to_yaml
from pdfast.data import ImageSource
from pdfast.engine.checkpoint import clear_finished
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from pdfast.io.files import sha256, write_file, writing
from pdfast.io.names import shell_word
from pdfast.io.plain import structure, unstructure
from pdfast.io.reading import load_yaml
from pdfast.schedule_config import ScheduleConfig

MAY_CHANGE = {"run", "device", "loader", "max_bad", "log_every", "checkpoint_every", "engine", "guard"}
KNOWN_BY = {
    "images_sha256": ("data", "other images than those of"),
    "teacher_sha256": ("teacher", "another teacher than"),
    "features_sha256": ("evaluation.features", "other features than those of"),
}
"""Hashes in the saved configuration, each of the contents behind a setting, which may then be spelled otherwise."""
IMAGES_ALONE = "images_alone_sha256"
"""The hash of the images without their labels, which says what of them was changed."""

LONG, SHOWN = 300, 60  # characters of a value in a message


@contextmanager
def open_run(
    config: RunConfig, source: ImageSource, world: World, teacher_sha256: Callable[[], str] | None = None
) -> Iterator[None]:
    """Create the run's folder, or check that it was begun with this configuration, these images and this teacher (where one
    was given, by the hash of its weights); the first process locks it until the end.

    UsageError where the folder can't be written, another run works in it, or a field differs (it is named).
    """
    with ExitStack() as until_the_end:

        def open_folder() -> None:
            with writing(config.run):
                config.run.mkdir(parents=True, exist_ok=True)
                lock = until_the_end.enter_context(open(config.folder.lock, "w"))
                # Else the lock would be held by the loaders' processes too, which may outlive a killed run.
                os.register_at_fork(after_in_child=lock.close)
            _begin_or_resume(config, source, _facts(config, source, teacher_sha256), lock)
            clear_finished(config.folder)

        world.run_on_rank0(open_folder)
        yield


def _facts(config: RunConfig, source: ImageSource, teacher_sha256: Callable[[], str] | None) -> dict[str, str]:
    hashes = source.identity.hashes
    facts = {"images_sha256": hashes.everything, IMAGES_ALONE: hashes.images}
    if teacher_sha256 is not None:
        facts["teacher_sha256"] = teacher_sha256()
    if (features := Path(config.evaluation.features)).is_file():
        facts["features_sha256"] = sha256(features)
    return facts


def changed_data(saved: dict[str, Any], source: ImageSource) -> str | None:
    """Return what of these data, `images` or `labels` alone, is not that which a run was begun with whose configuration is
    `saved`."""
    if "images_sha256" in saved:
        same = saved["images_sha256"] == source.identity.hashes.everything
    else:
        same = saved.get("data_sha256") == source.identity.earlier
    if same:
        return None
    return "labels" if saved.get(IMAGES_ALONE) == source.identity.hashes.images else "images"


def _begin_or_resume(config: RunConfig, source: ImageSource, facts: dict[str, str], lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"another process is working in {config.run}; wait for it, or choose another folder with --run"
        ) from None
    path, now = config.folder.config, unstructure(config) | facts
    if not path.exists():
        if config.folder.teacher.exists() or config.folder.students():
            raise UsageError(
                f"{config.run} holds models, and no config.yaml to say how they were made: restore it, or choose another folder "
                "with --run"
            )
        write_file(path, to_yaml(config) + yaml.safe_dump({"command": _command()} | facts, width=10_000))
        return
    saved = load_yaml(path)
    before = {name: value for name, value in saved.items() if name not in ("command", "data_sha256")}
    if changed_data(saved, source) is None:
        before["images_sha256"] = facts["images_sha256"]  # also of a run that an earlier version began
    before["schedule"] = _schedule_of(saved, path)
    before = _with_defaults(before, config)
    _refuse_changes(before, now, config.run)
    # Whoever reads the configuration finds what it names where it is now.
    spelled = {name: now[name] for name in ("run", "data", "teacher", "evaluation", "schedule") if name in now} | facts
    current = {name: value for name, value in saved.items() if name != "data_sha256"} | spelled
    if current != saved:
        write_file(path, yaml.safe_dump(current, sort_keys=False, width=10_000))


def _with_defaults(before: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return what a run was begun with, and where an earlier version knew no such setting, its default."""
    whole = dict(before)
    for f in dataclasses.fields(config):
        if f.name not in before:
            if f.default is not dataclasses.MISSING:
                whole[f.name] = unstructure(f.default) if dataclasses.is_dataclass(f.default) else f.default
        elif dataclasses.is_dataclass(value := getattr(config, f.name)) and isinstance(before[f.name], dict):
            whole[f.name] = _with_defaults(before[f.name], value)
    return whole


def _schedule_of(before: dict, saved: Path) -> Any:
    """Of a saved configuration, with the values of a table that an earlier version named by its path."""
    schedule = before.get("schedule")
    if not isinstance(schedule, dict) or schedule.get("alpha_bars") is None:
        return schedule
    try:
        return unstructure(structure(ScheduleConfig, schedule, "schedule").with_table())
    except UsageError as error:
        raise UsageError(f"the noise schedule of {saved} is a file, which must be there again: {error}") from None


def _command() -> str:
    """Return the command line as a person would type it."""
    main = sys.modules["__main__"].__spec__
    words = ["python", "-m", main.name, *sys.argv[1:]] if main else ["python", *sys.argv]
    return " ".join(map(shell_word, words))


def _refuse_changes(before: dict, now: dict, run: Path) -> None:
    proven = set()
    for fact, (path, other) in KNOWN_BY.items():
        if fact in now and (fact in before or fact == "images_sha256"):
            if before.get(fact) != now[fact]:
                if fact == "images_sha256" and before.get(IMAGES_ALONE) == now[IMAGES_ALONE]:
                    other = "other labels than those of"
                value = reduce(lambda fields, name: fields[name], path.split("."), now)
                raise UsageError(
                    f"{run} was begun with {other} {value}: give what it was begun with, or choose another folder with --run"
                )
            proven.add(path)
    for path, old, new in _changes(before, now):
        if path not in proven and path not in KNOWN_BY and path != IMAGES_ALONE:
            raise UsageError(
                f"{run} was begun with {path} = {_shown(old)}, now it is {_shown(new)}: give the same value, or choose another "
                "folder with --run"
            )


def _changes(before: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that differ, with both values, but for those that may."""
    for name in sorted(before.keys() | now.keys()):
        path, old, new = f"{prefix}{name}", before.get(name), now.get(name)
        if path in MAY_CHANGE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{path}.")
        elif old != new:
            yield path, old, new


def _shown(value: Any) -> str:
    """In a message; of a long one the beginning, and a hash to tell it by."""
    text = str(value)
    return (
        text if len(text) <= LONG else f"{text[:SHOWN]} ... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
    )
