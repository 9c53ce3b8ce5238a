"""Checkpoints within a stage of a run (the teacher's training, or one round).

    checkpoints/STAGE-UPDATE/rank-0003.safetensors    the part of each tensor that shard 3 holds
    checkpoints/STAGE-UPDATE/rank-0003.json           its hash
    checkpoints/STAGE-UPDATE/state.json               update, number of parts, and what else the stage needs, with their hash

Tensors and plain JSON, no pickle. A background thread writes them while training goes on; when all processes have written
theirs, one rename makes the folder appear: it is whole or absent, and the last few are kept. Parameters are sharded along
their first dimension, so that any number of processes can read what another number wrote.
"""

import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdfast.engine.parallelize import rows
from pdfast.engine.world import World
from pdfast.io.errors import RunError, UsageError
from pdfast.io.files import check_seal, commit_folder, sealed, sha256, sync, write_json, writing
from pdfast.io.names import utf8_path
from pdfast.io.reading import read_json
from pdfast.io.run_folder import RunFolder

KEEP = 2
DAMAGED = (OSError, ValueError, KeyError, TypeError, SafetensorError, UsageError)
STATE = {"update": int, "parts": int, "common": list, "extra": dict}
"""The fields of a state.json beside its checksum, and what they are."""


@dataclass(frozen=True)
class Checkpoint:
    update: int
    tensors: dict[str, Tensor]
    """On the CPU; of sharded tensors this process's rows."""
    extra: dict[str, Any]


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    update: int
    thread: Thread
    failure: Exception | None = field(default_factory=lambda: RuntimeError("its writer did not end"))


class Checkpoints:
    """The checkpoints of one stage; all processes call all methods."""

    def __init__(self, run: Path, stage: str, world: World) -> None:
        self._folder, self._stage, self._world = RunFolder(run).checkpoints, stage, world
        self._writing: _Writing | None = None

    def _path(self, update: int) -> Path:
        return self._folder / f"{self._stage}-{update:010d}"

    def _temporary(self, update: int) -> Path:
        return self._folder / f".{self._stage}-{update:010d}.tmp"

    def _folders(self) -> list[Path]:
        """Newest first; what has another name than a checkpoint's is somebody's own."""
        named = re.compile(re.escape(self._stage) + "-[0-9]{10,}")
        folders = [f for f in self._folder.glob(f"{self._stage}-*") if named.fullmatch(f.name) and f.is_dir()]
        return sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)

    def save(
        self, update: int, sharded: Mapping[str, Tensor], common: Mapping[str, Tensor], extra: dict[str, Any]
    ) -> None:
        """Begin to write the state after `update` updates; it is copied before this returns.

        sharded: this process's rows of tensors that are sharded over the shards; common: tensors equal on all.
        """
        self.finish()
        temporary = self._temporary(update)

        def prepare() -> bool:
            if self._path(update).exists():
                return False
            with writing(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                state = {"update": update, "parts": self._world.shards, "common": list(common), "extra": extra}
                write_json(temporary / "state.json", sealed(state))
            return True

        try:
            if not self._world.run_on_rank0(prepare):
                return
        except (UsageError, RunError) as error:
            self._say(f"checkpoint at update {update} not written: {error}; trying again at the next")
            return
        tensors = self._copied(sharded, common) if self._world.replica == 0 else None
        writer = Thread(target=self._write, args=(update, tensors), daemon=True)
        self._writing = _Writing(update, writer)
        writer.start()

    def _copied(self, sharded: Mapping[str, Tensor], common: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, with memory of their own."""
        named = dict(sharded) | (dict(common) if self._world.shard == 0 else {})
        copies = {}
        for name, tensor in named.items():
            pinned = tensor.device.type == "cuda"
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, update: int, tensors: dict[str, Tensor] | None) -> None:
        """In the background: no collectives here."""
        assert self._writing
        file = self._temporary(update) / f"rank-{self._world.shard:04d}.safetensors"
        try:
            if tensors is not None:
                with writing(file):
                    with utf8_path(file.parent) as folder:
                        save_file(tensors, folder / file.name)
                    sync(file)
                    write_json(file.with_suffix(".json"), {"sha256": sha256(file)})
            self._writing.failure = None
        except Exception as error:
            self._writing.failure = error

    def poll(self) -> None:
        """Make a checkpoint appear that all processes have written; called after each update."""
        if self._writing and not any(self._world.any(self._writing.thread.is_alive())):
            self._commit()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and make it appear."""
        if self._writing:
            self._writing.thread.join()
            self._commit()

    def _commit(self) -> None:
        assert self._writing
        update, failure, self._writing = self._writing.update, self._writing.failure, None
        (failed,) = self._world.any(failure is not None)
        if failure:
            self._say(f"checkpoint at update {update} not written: {failure}", of_all=True)
        if failed:
            self._say("training goes on, the checkpoint before is kept, and the next is tried again")

        def appear() -> None:
            if failed:
                shutil.rmtree(self._temporary(update), ignore_errors=True)
                return
            commit_folder(self._temporary(update), self._path(update))
            for old in self._folders()[KEEP:]:
                shutil.rmtree(old, ignore_errors=True)

        try:
            self._world.run_on_rank0(appear)
        except (UsageError, RunError) as error:
            self._say(f"checkpoint at update {update} not written: {error}")

    def _say(self, message: str, of_all: bool = False) -> None:
        if self._world.is_rank0 or of_all:
            print(f"pdfast: warning: {message}", file=sys.stderr, flush=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None where there is none. A damaged one is skipped with a warning; UsageError
        where all are damaged."""
        update = self._world.run_on_rank0(self._newest_whole)
        return None if update is None else self._load(self._path(update))

    def _newest_whole(self) -> int | None:
        self._forget_unfinished()
        folders = self._folders()
        for folder in folders:
            try:
                return self._check(folder)
            except DAMAGED as error:
                self._say(f"checkpoint {folder} is damaged ({error}); using the one before")
        if folders:
            raise UsageError(
                f"every checkpoint of this stage is damaged ({', '.join(str(f) for f in folders)}): "
                "delete them to start the stage again; finished stages are kept"
            )
        return None

    def _check(self, folder: Path) -> int:
        """Return the checkpoint's update; one of DAMAGED where something is missing or was changed."""
        meta = _read_state(folder)
        files = _files(folder, meta["parts"])
        if f"{meta['update']:010d}" != folder.name.rsplit("-", 1)[1] or sorted(folder.glob("*.safetensors")) != files:
            raise ValueError("its state.json was changed")
        for file in files:
            if sha256(file) != read_json(file.with_suffix(".json"))["sha256"]:
                raise ValueError(f"the hash of {file.name} differs")
        with utf8_path(files[0]) as named, safe_open(named, framework="pt") as first:
            if not set(meta["common"]) <= set(first.keys()):
                raise ValueError("its state.json was changed")
        for file in files:
            _check_finite(file, set(meta["common"]))
        return meta["update"]

    def _load(self, folder: Path) -> Checkpoint:
        meta = _read_state(folder)
        with utf8_path(folder) as named:
            files = [safe_open(file, framework="pt") for file in _files(named, meta["parts"])]
        tensors = {}
        for name in files[0].keys():  # it is not a dict
            if name in meta["common"]:
                tensors[name] = files[0].get_tensor(name)
            else:
                tensors[name] = _own_rows([file.get_slice(name) for file in files], self._world)
        return Checkpoint(meta["update"], tensors, meta["extra"])

    def _forget_unfinished(self) -> None:
        for folder in self._folder.glob(f".{self._stage}-*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Delete this stage's checkpoints: the stage is finished and written elsewhere."""
        self.finish()
        if self._world.is_rank0:
            self._forget_unfinished()
            for folder in self._folders():
                shutil.rmtree(folder, ignore_errors=True)


def _read_state(folder: Path) -> dict[str, Any]:
    """Return what its state.json says. One of DAMAGED where that is not what was written, as far as can be seen: older ones
    have no checksum."""
    meta = check_seal(read_json(folder / "state.json"))
    if meta.keys() != STATE.keys() or any(type(meta[name]) is not kind for name, kind in STATE.items()):
        raise ValueError("its state.json was changed")
    if meta["parts"] < 1 or not all(isinstance(name, str) for name in meta["common"]):
        raise ValueError("its state.json was changed")
    return meta


def _files(folder: Path, parts: int) -> list[Path]:
    return [folder / f"rank-{part:04d}.safetensors" for part in range(parts)]


def clear_finished(run: RunFolder) -> None:
    """Delete the checkpoints of stages whose result is there: a run may be killed between the two."""
    for folder in run.checkpoints.glob("*"):
        stage = re.fullmatch(r"\.?(teacher|student-([0-9]{4,}))-[0-9]{10,}(\.tmp)?", folder.name)
        if stage and (run.student(int(stage[2])) if stage[2] else run.teacher).is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _check_finite(file: Path, common: set[str]) -> None:
    """Raise a ValueError where a parameter, or its optimizer's state, is not finite: no update leaves them so."""
    with utf8_path(file) as named, safe_open(named, framework="pt") as opened:
        for name in set(opened.keys()) - common:
            if not bool(torch.isfinite(opened.get_tensor(name)).all()):
                raise ValueError(f"{name} in {file.name} is not finite")


def _own_rows(parts: list[Any], world: World) -> Tensor:
    """This process's rows of a tensor that was written in parts: slices of safetensors files, one after the other."""
    sizes = [part.get_shape()[0] for part in parts]
    first, end = rows(sum(sizes), world.shards, world.shard)
    pieces, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        low, high = max(first - start, 0), min(end - start, size)
        if low < high:
            pieces.append(part[low:high])
        start += size
    return torch.cat(pieces) if pieces else parts[0][:0]
