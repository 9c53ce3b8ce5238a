"""A model on disk: a folder with KIND.safetensors (teacher or student), config.json and what was measured of it.

config.json holds the network, the schedule with its values, the step count it was made for, the hash of the weights and one of
itself: no pickle, and a changed file is noticed.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pdfast.diffusion.circle import SMALLEST_SINE_TO_SAMPLE, check_start
from pdfast.io.bounds import GUIDANCE, STEPS, require
from pdfast.io.errors import UsageError
from pdfast.io.files import SEAL, check_seal, sealed, sha256, write_json
from pdfast.io.names import utf8_path
from pdfast.io.plain import structure, unstructure
from pdfast.io.reading import read_json, shown
from pdfast.networks import ModelConfig, Network
from pdfast.networks.guided import at_guidance
from pdfast.own_code import is_function
from pdfast.pretrained import edm, is_pipeline, load_edm, load_function, load_pipeline, network_config
from pdfast.pretrained.module import weights_hash
from pdfast.pretrained.weights import build_with, read_weights
from pdfast.schedule_config import ScheduleConfig

FORMAT = "pdfast-1"
FIELDS = {"format", "kind", "steps", "network", "schedule", "sha256"}


@dataclass(frozen=True)
class SavedModel:
    """A network with what is needed to sample from it. `steps` is the step count it was distilled for, None for a teacher."""

    network: Network
    schedule: ScheduleConfig
    steps: int | None
    folder: Path

    @property
    def config(self) -> ModelConfig:
        """Of the network."""
        return self.network.config

    def weights_sha256(self) -> str:
        """Of the files as they are now; of the network, where a function made it."""
        if is_function(self.folder):
            return weights_hash(self.network)
        files = sorted(self.folder.rglob("*.safetensors"))
        return sha256(files[0]) if len(files) == 1 else hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def at_guidance(self, g: float | None) -> "SavedModel":
        """Return the model asked at guidance g, as it is for None. UsageError where it cannot be, or has another guidance inside."""
        require("guidance", g, GUIDANCE)
        try:
            return self if g is None else replace(self, network=at_guidance(self.network, g))
        except ValueError as error:
            raise UsageError(f"--guidance {g:g}, {self.folder}: {error}") from None

    def check_start(self) -> None:
        """Raise a UsageError for a network that cannot be sampled from where its schedule ends."""
        phi = float(self.schedule.build().phi(torch.ones((), dtype=torch.float64)))
        try:
            check_start(self.config.prediction, phi, SMALLEST_SINE_TO_SAMPLE)
        except ValueError as error:
            raise UsageError(f"{self.folder}: {error}") from None


def fill_model_folder(
    folder: Path, weights: dict[str, Tensor], network: ModelConfig, schedule: ScheduleConfig, steps: int | None
) -> None:
    """Write the weights and config.json into an existing (temporary) folder."""
    kind = "teacher" if steps is None else "student"
    file = folder / f"{kind}.safetensors"
    with utf8_path(folder) as named:
        save_file({name: t.contiguous().cpu() for name, t in weights.items()}, named / file.name)
    meta = {
        "format": FORMAT,
        "kind": kind,
        "steps": steps,
        "network": unstructure(network),
        "schedule": unstructure(schedule),
        "sha256": sha256(file),
    }
    write_json(folder / "config.json", sealed(meta))


def is_model(folder: Path) -> bool:
    """Tell whether it is that of one model, and not of a run."""
    return (folder / "config.json").exists() or is_pipeline(folder) or edm.is_pickle(folder)


def load_model(folder: Path, device: torch.device) -> SavedModel:
    """Load a teacher's or student's folder, a pipeline's of diffusers, one of EDM's network, or what the function of the command line
    makes. UsageError, in one line, for a missing, damaged or foreign one."""
    network: Network
    if is_function(folder):
        network, schedule = load_function(str(folder))
        return SavedModel(network.to(device), schedule, None, folder)
    if edm.is_pickle(folder):
        raise UsageError(
            f"{folder} holds a pickle, which runs code when it is read: write a folder from it with {edm.SCRIPT}, where that "
            "is of EDM's authors"
        )
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give the folder of a model, where this may be its weights")
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}: give a model's, with config.json and *.safetensors, or a diffusers pipeline's on this "
            "disk (nothing is downloaded), or package.module:function"
        )
    if is_pipeline(folder):
        network, schedule = load_pipeline(folder)
        return SavedModel(network.to(device), schedule, None, folder)
    file = folder / "config.json"
    if not file.exists():
        raise UsageError(
            f"{folder} holds no model: give a folder with config.json and *.safetensors, such as teacher or students/0004 of a "
            "run, or a diffusers pipeline's, with model_index.json"
        )
    meta = read_json(file, infinite=True)
    if "_class_name" in meta:
        raise UsageError(
            f"{folder} is a part of a diffusers pipeline: give the folder above, with model_index.json and the scheduler"
        )
    if meta.get("format") == edm.FORMAT:
        network, schedule = load_edm(folder, meta)
        return SavedModel(network.to(device), schedule, None, folder)
    if meta.get("format") != FORMAT or meta.keys() - {SEAL} != FIELDS:
        raise UsageError(f"{file} is not of a model that this version of pdfast wrote ({FORMAT})")
    return _load_own(folder, read_json(file), device)  # in ours nothing is infinite


def check_model(folder: Path) -> None:
    """Raise a UsageError unless a teacher's or student's folder of a run holds what was written there."""
    _checked(folder, read_json(folder / "config.json"))


def _checked(folder: Path, meta: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return what a config.json of our own format says, and the file of weights, after their hashes were compared."""
    where = str(folder / "config.json")
    try:
        meta = check_seal(meta)
    except ValueError as error:
        raise UsageError(f"{where} was changed ({error}): restore it, or delete {folder} to make it again") from None
    kind, steps = meta["kind"], meta["steps"]
    if (kind, steps) != ("teacher", None) and not (kind == "student" and type(steps) is int and steps in STEPS):
        raise UsageError(f"{where} is of a {shown(kind)} of {shown(steps)} steps: it was damaged or changed")
    place = folder.absolute()
    if place.parent.name == "students" and place.name.isdecimal() and int(place.name) != steps:
        raise UsageError(f"{folder} holds a {kind} of {shown(steps)} steps: give the folder its own name again")
    file = folder / f"{kind}.safetensors"
    if not file.is_file():
        raise UsageError(f"{file} is missing; restore it, or delete {folder} to make it again")
    if sha256(file) != meta["sha256"]:
        raise UsageError(
            f"{file} is damaged or was changed (its hash differs from config.json): restore it, or delete {folder}"
        )
    return meta, file


def _load_own(folder: Path, meta: dict[str, Any], device: torch.device) -> SavedModel:
    """Load the model of a folder whose config.json, of our own format, is `meta`."""
    meta, file = _checked(folder, meta)
    where = str(folder / "config.json")
    config = network_config(meta["network"], where)
    schedule = _schedule(meta["schedule"], where)
    network = build_with(config.build, read_weights([file], device), file)
    return SavedModel(network.to(device), schedule, meta["steps"], folder)


def _schedule(plain: Any, where: str) -> ScheduleConfig:
    """Read the schedule of a config.json, whole: earlier versions named a table by its path."""
    given = structure(ScheduleConfig, plain, where)
    try:
        schedule = given.with_table()
        schedule.build()
    except UsageError as error:
        if given.alpha_bars is None:
            raise UsageError(f"{where}: {error}") from None
        raise UsageError(f"the noise schedule of {where} is a file, which must be there again: {error}") from None
    return schedule
