"""A model on disk: a folder with KIND.safetensors (teacher or student), config.json and what was measured of it.

config.json holds the network, the schedule, the step count it was made for and the hash of the weights: no pickle, and a
changed file is noticed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdfast.config import ScheduleConfig, from_plain, to_plain
from pdfast.engine.files import sha256, write_json
from pdfast.errors import UsageError
from pdfast.networks import NetworkConfig, UNet

FORMAT = "pdfast-1"


@dataclass(frozen=True)
class SavedModel:
    """A network with what is needed to sample from it. `steps` is the step count it was distilled for, None for a teacher."""

    network: UNet
    schedule: ScheduleConfig
    steps: int | None
    folder: Path


def fill_model_folder(
    folder: Path, weights: dict[str, Tensor], network: NetworkConfig, schedule: ScheduleConfig, steps: int | None
) -> None:
    """Write the weights and config.json into an existing (temporary) folder."""
    kind = "teacher" if steps is None else "student"
    file = folder / f"{kind}.safetensors"
    save_file({name: t.contiguous().cpu() for name, t in weights.items()}, file)
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "kind": kind,
            "steps": steps,
            "network": to_plain(network),
            "schedule": to_plain(schedule),
            "sha256": sha256(file),
        },
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UsageError where the file is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object")
    return value


def load_model(folder: Path, device: torch.device) -> SavedModel:
    """Load a teacher's or student's folder. UsageError, in one line, for a missing, damaged or foreign one."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; a model folder holds config.json and *.safetensors")
    meta = read_json(folder / "config.json")
    if meta.get("format") != FORMAT or not {"kind", "steps", "network", "schedule", "sha256"} <= meta.keys():
        raise UsageError(f"{folder / 'config.json'} is not of a model that this version of pdfast wrote ({FORMAT})")
    file = folder / f"{meta['kind']}.safetensors"
    if not file.is_file():
        raise UsageError(f"{file} is missing; restore it, or delete {folder} to make it again")
    if sha256(file) != meta["sha256"]:
        raise UsageError(
            f"{file} is damaged or was changed (its hash differs from config.json): restore it, or delete {folder}"
        )
    network_config = from_plain(NetworkConfig, meta["network"], str(folder / "config.json"))
    schedule = from_plain(ScheduleConfig, meta["schedule"], str(folder / "config.json"))
    try:
        weights = load_file(file, device=str(device))
        with torch.device("meta"):
            network = UNet(network_config)
        network.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UsageError(f"{file} does not fit its config.json: {str(error).splitlines()[0]}") from None
    return SavedModel(network.eval().requires_grad_(False), schedule, meta["steps"], folder)
