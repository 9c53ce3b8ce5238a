"""A student, or any model, as a pipeline that diffusers samples to the same images:

    python -m pdfast.export runs/digits --steps 4 out/digits-4
    >>> DiffusionPipeline.from_pretrained("out/digits-4")(num_inference_steps=4)

The folder is loaded again before it appears, and images from the same noise are compared.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from pdfast import own_code
from pdfast.cli import parse, run_command
from pdfast.data import codec_of
from pdfast.diffusers_tables import library
from pdfast.diffusion import sample
from pdfast.engine.device import open_device
from pdfast.evaluation.evaluator import check_finite
from pdfast.evaluation.metrics import in_words
from pdfast.evaluation.stored import read_metrics
from pdfast.exporting.pipeline import write_pipeline
from pdfast.flags import OptionalFloat, OptionalInt, OptionalString, Positional
from pdfast.io.bounds import STEPS, require
from pdfast.io.errors import RunError, UsageError
from pdfast.io.files import check_folder, check_seal, sealed, write_folder, write_json
from pdfast.io.grids import image_grid, write_png
from pdfast.io.names import printable, utf8_path
from pdfast.io.plain import unstructure
from pdfast.io.reading import read_json
from pdfast.io.text import count_steps
from pdfast.networks.guided import Guided
from pdfast.pretrained.model_folder import SavedModel
from pdfast.sample import find_model

SHOWN = 16  # images in the grid, at least as many are compared
COMPARED = 1 << 15  # uint8 values, about
MOST_CHANGED = 1e-3  # of them
SEED = 0
REMEDY = "choose another folder to write"


@dataclass(frozen=True)
class Arguments:
    """Write a model as a pipeline of diffusers, and compare what both sample."""

    model: Annotated[Path, Positional]
    """A run's folder (then --steps chooses the student; without it the one of fewest steps), or a teacher's or student's."""
    out: Annotated[Path, Positional]
    """The folder to write; it must not exist."""
    steps: OptionalInt = None
    """Sampling steps; a student takes its own unless said, a teacher 256."""
    guidance: OptionalFloat = None
    """Classifier-free guidance that is built into the pipeline, of a student that takes it as an input; unless said the middle of its
    range."""
    format: Literal["diffusers", "safetensors"] = "diffusers"
    """diffusers: a pipeline. safetensors: the weights with our config.json, as in a run."""
    network_from: OptionalString = None
    """package.module:function, for a network made by code of your own, which runs only where you name it."""
    device: str = "auto"
    """Where both are compared: auto (a GPU where there is one), cpu, cuda or cuda:N."""


def load_again(folder: Path, custom: bool) -> Any:
    """Return the pipeline in a folder, as a user loads it."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it says that the network of a model file is not a UNet2DModel, which is so
    pipeline = library().DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, trust_remote_code=custom, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compare(
    folder: Path, custom: bool, saved: SavedModel, steps: int, device: torch.device
) -> tuple[np.ndarray, float]:
    """Return images uint8 [n, H, W, C] of the pipeline in `folder`, and the fraction of their values that are not ours. RunError
    where images are not finite."""
    config = saved.config
    count = max(SHOWN, COMPARED // math.prod(config.image_shape))
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(count, *config.image_shape, generator=generator).to(device)
    classes = [i % config.num_classes for i in range(count)] if config.num_classes else None
    cond = config.condition(None if classes is None else torch.tensor(classes, device=device))
    network = saved.network.to(device)
    x = sample(network, z, saved.schedule.build(), steps, cond=cond)
    check_finite(bool(torch.isfinite(x).all()), steps)
    ours = codec_of(config).decode(x).permute(0, 2, 3, 1).cpu().numpy()
    pipeline = load_again(folder, custom).to(device)
    labels = {} if classes is None else {"class_labels": classes}
    drawn = pipeline(
        batch_size=count,
        num_inference_steps=steps,
        generator=generator.manual_seed(SEED),
        output_type="np",
        **labels,
    ).images
    check_finite(bool(np.isfinite(drawn).all()), steps)
    theirs = np.round(drawn * 255).astype(np.uint8).reshape(ours.shape)
    return theirs, float((theirs != ours).mean())


def model_card(saved: SavedModel, steps: int, model_file: str | None, changed: float) -> str:
    """README.md of the pipeline's folder: how to sample, what was trained, what was measured."""
    config = saved.config
    height, width, _ = codec_of(config).data_shape(config.image_shape)
    call = f"num_inference_steps={steps}, batch_size=16"
    call += f", class_labels=[i % {config.num_classes} for i in range(16)]" if config.num_classes else ""
    loading = '"PATH", trust_remote_code=True' if model_file else '"PATH"'
    kind = f"the student of {count_steps(steps)}" if saved.steps else f"a teacher, for {count_steps(steps)}"
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [diffusers, progressive-distillation, few-step]",
        "---",
        "",
        f"# A diffusion model of {height}x{width} images: {kind}",
        "",
        "Made by pdfast with Progressive Distillation (Salimans & Ho 2022, arXiv 2202.00512).",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({loading})",
        f"images = pipeline({call}).images",
        "```",
        "",
        "![samples](grid.png)",
        "",
        f"Sample in {count_steps(steps)}, which it was made for. Images equal those of pdfast from the same noise, in float32: "
        f"{changed:.4%} of the uint8 values differed when it was written.",
    ]
    if guidance := config.guidance:
        lines += [
            "",
            f"It has classifier-free guidance of {sum(guidance) / len(guidance):g} inside, in one call of the network: add none to it.",
        ]
    if model_file:
        lines += [
            "",
            f"Its network is a U-Net whose output is combined with its input by time, in `unet/{model_file}`: diffusers asks for "
            "`trust_remote_code=True` to load that file.",
        ]
    return "\n".join([*lines, *_facts(saved)]) + "\n"


def _facts(saved: SavedModel) -> list[str]:
    if not (saved.folder / "metrics.json").exists():
        return []
    metrics = read_metrics(saved.folder)
    space, training, data = metrics["feature_space"], metrics["training"], metrics["data"]
    lines = ["", "| steps (DDIM) | " + space + " |", "|---:|---:|"]
    lines += [f"| {row['steps']} | {row['fd']:.3f} |" for row in metrics["evaluation"]]
    lines += [
        "",
        f"{space}: the Frechet distance of {metrics['num_samples']} drawn to {metrics['num_real']} real images"
        + (f"; two sets of real images are {metrics['floor']:.3f} apart." if metrics["floor"] is not None else "."),
        "",
        f"- data: {data['name']}, {data['num_images']} images of {'x'.join(map(str, data['shape']))}",
    ]
    lines += [line for row in metrics["evaluation"] if (line := _seeds(row))]
    if training:
        lines.append(
            f"- training: {training['updates']} updates on {training['images']} images in {training['seconds']:.0f} s "
            f"({metrics.get('processes', 1)} processes, {metrics['device']})"
        )
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return [*lines, f"- {versions}" + (f", commit {metrics['commit']}" if metrics["commit"] else "")]


def _seeds(row: dict[str, Any]) -> str | None:
    """Return a line on how near the images are to the teacher's from the same noise; None where nothing was compared."""
    if row.get("feature_distance") is None or not row["mse"]:
        return None
    text = f"- in {count_steps(row['steps'])}, next to its teacher's images from the same noise: PSNR {in_words(row['psnr'])} dB, "
    text += f"{in_words(row['feature_distance'])} of the distance between images of different noise"
    for what in ("diversity", "contrast", "saturation"):
        if (ratio := row.get(f"{what}_ratio")) is not None:
            text += f", {what} {in_words(ratio)}"
    return text + " times the teacher's"


def export_pipeline(saved: SavedModel, steps: int, out: Path, device: torch.device) -> float:
    """Write the folder `out`, whole or not at all; returns the fraction of uint8 values that diffusers draws otherwise.

    RunError where that is too large.
    """
    changed = 0.0

    def fill(folder: Path) -> None:
        nonlocal changed
        with utf8_path(folder) as named:
            model_file = write_pipeline(named, saved.network.cpu().float(), saved.schedule.build(), steps)
            images, changed = compare(named, model_file is not None, saved, steps, device)
        if changed > MOST_CHANGED:
            raise RunError(
                f"diffusers draws other images than pdfast: {changed:.2%} of the values differ; nothing was written: this is a "
                "bug, report it"
            )
        write_png(folder / "grid.png", image_grid(images[:SHOWN], columns=4, scale=max(1, 64 // images.shape[1])))
        (folder / "README.md").write_text(printable(model_card(saved, steps, model_file, changed)), encoding="utf-8")

    write_folder(out, fill, REMEDY)
    return changed


def export_plain(saved: SavedModel, out: Path) -> None:
    """The model's own folder again: weights, config.json and what was measured."""
    if not (saved.folder / "config.json").exists():
        raise UsageError(f"{saved.folder} is no folder that pdfast wrote: its weights are where they came from")

    def fill(folder: Path) -> None:
        for pattern in ("*.safetensors", "*.json", "grid.png"):
            for file in saved.folder.glob(pattern):
                shutil.copy(file, folder / file.name)
        meta = read_json(folder / "config.json", infinite=True)
        if "schedule" in meta:  # whole, also where an earlier version named its table by a path
            whole = check_seal(meta) | {"schedule": unstructure(saved.schedule)}
            write_json(folder / "config.json", sealed(whole))

    write_folder(out, fill, REMEDY)


def main() -> None:
    arguments = parse(Arguments, prog="python -m pdfast.export", description=__doc__)
    own_code.allow(arguments.network_from)
    if os.path.lexists(arguments.out):
        raise UsageError(f"{arguments.out} is there already: choose another folder, or delete it")
    check_folder(arguments.out, REMEDY)
    require("steps", arguments.steps, STEPS)
    saved = find_model(arguments.model, arguments.steps, torch.device("cpu")).at_guidance(arguments.guidance)
    steps = arguments.steps or saved.steps or 256
    if arguments.format == "safetensors":
        if arguments.guidance is not None:
            raise UsageError(
                f"--guidance {arguments.guidance:g} is for a pipeline of diffusers: the weights are of any, leave it out"
            )
        export_plain(saved, arguments.out)
        print(f"{saved.folder} -> {arguments.out}")
        return
    if isinstance(saved.network, Guided):
        raise UsageError(
            f"{saved.folder} is a network that is asked twice, for which diffusers has no class: export a student of it, which is asked once, "
            "or write safetensors"
        )
    saved.check_start()
    device = open_device(arguments.device)
    changed = export_pipeline(saved, steps, arguments.out, device)
    print(
        f"{saved.folder} -> {arguments.out}: diffusers draws the same images in {count_steps(steps)} ({changed:.4%} changed)"
    )


if __name__ == "__main__":
    run_command(main)
