"""Checkpoints within a stage of a run (the teacher's training, or one round).

checkpoints/STAGE-UPDATE/{state.safetensors, state.json}: tensors and plain JSON with the file's hash, no pickle. A folder
appears by one rename, so that it is whole or absent, and the last two are kept.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdfast.engine.files import sha256, write_folder, write_json
from pdfast.errors import UsageError

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    update: int
    tensors: dict[str, Tensor]
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, run: Path, stage: str) -> None:
        self._folder = run / "checkpoints"
        self._stage = stage

    def _folders(self) -> list[Path]:
        """Newest first."""
        return sorted(self._folder.glob(f"{self._stage}-[0-9]*"), reverse=True)

    def save(self, update: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Write the state after `update` updates, then delete all but the last two."""
        path = self._folder / f"{self._stage}-{update:010d}"
        if path.exists():
            return

        def fill(folder: Path) -> None:
            weights = folder / "state.safetensors"
            save_file({name: t.contiguous() for name, t in tensors.items()}, weights)
            write_json(folder / "state.json", {"update": update, "sha256": sha256(weights), "extra": extra})

        write_folder(path, fill)
        for old in self._folders()[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None where there is none. A damaged one is skipped with a warning; UsageError where
        all are damaged."""
        folders = self._folders()
        for folder in folders:
            try:
                return self._load(folder)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                print(
                    f"pdfast: warning: checkpoint {folder} is damaged ({error}); using the one before", file=sys.stderr
                )
        if folders:
            raise UsageError(
                f"every checkpoint of this stage is damaged ({', '.join(str(f) for f in folders)}): "
                "delete them to start the stage again; finished stages are kept"
            )
        return None

    def _load(self, folder: Path) -> Checkpoint:
        meta = json.loads((folder / "state.json").read_text())
        weights = folder / "state.safetensors"
        if sha256(weights) != meta["sha256"]:
            raise ValueError("its hash differs")
        return Checkpoint(meta["update"], load_file(weights), meta["extra"])

    def clear(self) -> None:
        """Delete this stage's checkpoints: the stage is finished and written elsewhere."""
        for folder in self._folders():
            shutil.rmtree(folder, ignore_errors=True)
