"""Metrics and images that a run wrote beside a model. They are what was written, or a UsageError names the file that is not."""

from pathlib import Path
from typing import Any

import numpy as np

from pdfast.evaluation import seeds
from pdfast.io.errors import UsageError
from pdfast.io.files import check_seal
from pdfast.io.reading import read_array, read_json

NUMBER = (int, float)
PERHAPS = (int, float, type(None))
ROW = {
    "steps": int,
    "fd": NUMBER,
    "mse": PERHAPS,
    "psnr": PERHAPS,
    "channel_mean": [NUMBER],
    "channel_std": [NUMBER],
    "seconds_per_sample": NUMBER,
    **dict.fromkeys(("kd", "kd_std", "cs", "cs_std", "precision", "recall", *seeds.NAMES), PERHAPS),
}
"""A row of figures; the last line's are missing in what older versions wrote."""
METRICS = {
    "feature_space": str,
    "num_samples": int,
    "num_real": int,
    "floor": PERHAPS,
    "sampler": str,
    "device": str,
    "processes": (int, type(None)),
    "versions": {"pdfast": str, "torch": str},
    "commit": (str, type(None)),
    "data": {"name": str, "num_images": int, "shape": [int]},
    "real": {"channel_mean": [NUMBER], "channel_std": [NUMBER]},
    "evaluation": [ROW],
}
TRAINING = {"updates": int, "images": int, "seconds": NUMBER, "images_per_second": NUMBER, "network_evaluations": int}
NAMES = {"fd": str, "kd": str, "cs": str}
CONVERSION = {"from": str, "original": [ROW], "untrained": [ROW]}
OPTIONAL = {
    "training": TRAINING,
    "names": NAMES,
    "real_against_real": {
        "fd": PERHAPS,
        **dict.fromkeys(("kd", "kd_std", "cs", "cs_std", "precision", "recall"), PERHAPS),
    },
    "conversion": CONVERSION,
}


def _fits(value: Any, shape: Any) -> bool:
    """Tell whether plain data have at least the fields of a shape: a type, some, [shape of each], or {name: shape}."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), inner) for name, inner in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(inner, shape[0]) for inner in value)
    return isinstance(value, shape) and not isinstance(value, bool)


def _is_whole(metrics: dict[str, Any]) -> bool:
    if not _fits(metrics, METRICS) or not metrics["evaluation"]:
        return False
    if any(metrics.get(name) is not None and not _fits(metrics[name], shape) for name, shape in OPTIONAL.items()):
        return False
    rows, channels = metrics["evaluation"], len(metrics["real"]["channel_mean"])
    of_channels = [
        metrics["real"]["channel_std"],
        *(row[name] for row in rows for name in ("channel_mean", "channel_std")),
    ]
    return all(row["steps"] > 0 and row["seconds_per_sample"] > 0 and row["fd"] >= 0 for row in rows) and all(
        len(values) == channels for values in of_channels
    )


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics.json of a teacher's or student's folder. UsageError where it is missing or is not what was written."""
    file = folder / "metrics.json"
    try:
        metrics = check_seal(read_json(file))
    except ValueError as error:
        raise UsageError(f"{file} was changed ({error}): restore it, or delete {folder} to make it again") from None
    if not _is_whole(metrics):
        raise UsageError(f"{file} lacks figures that a run writes: restore it, or delete {folder} to make it again")
    return metrics


def read_images(file: Path) -> np.ndarray:
    """Return images for a grid, uint8 [k, H, W, 1 or 3]. UsageError where the file holds anything else."""
    images = read_array(file)
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size or images.shape[3] not in (1, 3):
        raise UsageError(f"{file} holds no images: {images.dtype} {images.shape}")
    return images


def read_reference(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the images that those of all students are compared with, uint8 of a shape [n, C, H, W]. UsageError where the
    file holds anything else."""
    file = folder / "reference.npy"
    images = read_array(file)
    if images.dtype != np.uint8 or images.shape != shape:
        raise UsageError(
            f"{file} holds {images.dtype} {images.shape}, a run writes uint8 {shape}: restore it, or delete {folder} to make "
            "it again"
        )
    return images
