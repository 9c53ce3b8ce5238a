"""Draw images from a run, one of its rounds, or a model's folder:

    python -m pdfast.sample runs/digits --steps 4 --out samples.png
    python -m pdfast.sample runs/digits/students/0001 --count 1000 --out samples.npz

Image i depends on (seed, i) alone, whatever the batch size.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import numpy as np
import torch

from pdfast import own_code
from pdfast.cli import parse, run_command
from pdfast.data import codec_of
from pdfast.diffusion import ancestral, angles, noise, sample
from pdfast.diffusion.noise import Stream
from pdfast.engine import parallelize
from pdfast.engine.device import open_device
from pdfast.evaluation.evaluator import check_finite
from pdfast.flags import OptionalFloat, OptionalInt, OptionalString, Positional
from pdfast.io.bounds import BATCH, SEED, STEPS, between, require, whole
from pdfast.io.errors import UsageError
from pdfast.io.files import check_file, writing_file
from pdfast.io.grids import image_grid, write_png
from pdfast.io.run_folder import RunFolder
from pdfast.pretrained.model_folder import SavedModel, is_model, load_model

REMEDY = "choose another file with --out"


class _Callable(ModuleType):
    """This module: `pdfast.sample(...)` is the sampler of `pdfast.diffusion` also where the command's module was imported, which
    has the same name."""

    __call__ = staticmethod(sample)


sys.modules[__name__].__class__ = _Callable


@dataclass(frozen=True)
class Arguments:
    """Draw images from a run, one of its rounds, or a model's folder."""

    model: Annotated[Path, Positional]
    """A run's folder (then --steps chooses the student; without it the one of fewest steps), or a teacher's or student's."""
    steps: OptionalInt = None
    """Sampling steps; a student takes its own unless said."""
    count: int = 64
    """How many images."""
    out: Path = Path("samples.png")
    """Where to: .png for a grid, .npz for the arrays (`images` uint8 [N, H, W, C], and `labels`)."""
    seed: int = 0
    """Image i depends on the seed and i alone."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn (class-conditional models); all of them unless said."""
    guidance: OptionalFloat = None
    """Classifier-free guidance: of a student that takes it as an input, where unless said it is the middle of its range; of a teacher that
    was trained with --train.label-dropout. 1 is none."""
    sampler: Literal["ddim", "ancestral"] = "ddim"
    """ddim is what students are distilled for; ancestral adds noise at each step, for teachers at many steps."""
    variance: float = 0.0
    """ancestral: 0 for the smaller variance, 1 for the larger, between them their geometric interpolation."""
    clip: bool = False
    """Clip each x-prediction to [-1, 1]."""
    batch_size: int = 256
    """Images generated at once."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations; auto is bf16 on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network's blocks; auto is on for a GPU, off for a CPU. It pays for many images."""
    network_from: OptionalString = None
    """package.module:function, for a network made by code of your own, which runs only where you name it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""


def find_model(folder: Path, steps: int | None, device: torch.device) -> SavedModel:
    """Return the model in a model's folder, or in a run's: the student of `steps` steps, or of fewest; the teacher where there
    are no students.

    UsageError where there is none.
    """
    if is_model(folder) or not folder.is_dir():
        return load_model(folder, device)
    run = RunFolder(folder)
    students = run.students()
    if steps in students:
        return load_model(students[steps], device)
    if steps is None and students:
        return load_model(students[min(students)], device)
    if students:
        raise UsageError(
            f"{folder} has no student of {steps} steps, but of {', '.join(map(str, sorted(students)))}; for its teacher say "
            f"{run.teacher}"
        )
    if run.teacher.is_dir():
        return load_model(run.teacher, device)
    raise UsageError(f"{folder} is neither a run with a teacher or students nor a model's folder")


def draw(arguments: Arguments, saved: SavedModel, device: torch.device) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Return images uint8 [N, H, W, C], labels int64 [N] or None, and the number of steps. RunError where images are not
    finite."""
    config = saved.config
    steps = arguments.steps or saved.steps or 256
    for c in arguments.classes:
        if not 0 <= c < config.num_classes:
            raise UsageError(f"--classes {c}: this model has {config.num_classes or 'no'} classes")
    classes = torch.tensor(arguments.classes or range(config.num_classes), device=device)
    phi = angles(saved.schedule.build(), steps)
    images, labels = [], []
    batches = -(-arguments.count // arguments.batch_size)
    batch_size = -(-arguments.count // batches)  # of one size, for compiled code; what is too many is dropped
    for batch in range(batches):
        index = torch.arange(batch * batch_size, (batch + 1) * batch_size, device=device)
        z = noise.normal(noise.key(arguments.seed, Stream.SAMPLE), index, config.image_shape)
        label = classes[index % len(classes)] if config.num_classes else None
        cond = config.condition(label)
        if arguments.sampler == "ddim":
            x = sample(saved.network, z, saved.schedule.build(), steps, cond=cond, clip=arguments.clip)
        else:

            def step_noise(i: int, index: torch.Tensor = index) -> torch.Tensor:
                return noise.normal(noise.key(arguments.seed, Stream.ANCESTRAL, update=i), index, config.image_shape)

            x = ancestral(
                saved.network, z, phi, step_noise, variance=arguments.variance, cond=cond, clip=arguments.clip
            )
        check_finite(bool(torch.isfinite(x).all()), steps)
        images.append(codec_of(config).decode(x).permute(0, 2, 3, 1).cpu().numpy())
        if label is not None:
            labels.append(label.cpu().numpy())
    drawn, count = np.concatenate(images), arguments.count
    return drawn[:count], np.concatenate(labels)[:count] if labels else None, steps


def picture(images: np.ndarray) -> np.ndarray:
    """Return images uint8 [N, H, W, C] in a square, enlarged where they are tiny: uint8 [H', W', 3]."""
    return image_grid(images, columns=max(1, round(len(images) ** 0.5)), scale=max(1, 64 // images.shape[1]))


def main() -> None:
    arguments = parse(Arguments, prog="python -m pdfast.sample", description=__doc__)
    own_code.allow(arguments.network_from)
    require("steps", arguments.steps, STEPS)
    require("count", arguments.count, whole(1, 10**7))
    require("batch-size", arguments.batch_size, BATCH)
    require("variance", arguments.variance, between(0, 1))
    require("seed", arguments.seed, SEED)
    if arguments.out.suffix not in (".png", ".npz"):
        raise UsageError(f"--out {arguments.out}: end it in .png for a grid or .npz for the arrays")
    check_file(arguments.out, REMEDY)
    device = open_device(arguments.device)
    saved = find_model(arguments.model, arguments.steps, device).at_guidance(arguments.guidance)
    saved.check_start()
    channels = codec_of(saved.config).data_shape(saved.config.image_shape)[2]
    if arguments.out.suffix == ".png" and channels not in (1, 3):
        raise UsageError(f"--out {arguments.out}: images of {channels} channels are no picture, end it in .npz")
    parallelize.for_sampling(saved.network, device, arguments.dtype, arguments.compile)
    began = time.perf_counter()
    images, labels, steps = draw(arguments, saved, device)
    rate = len(images) / (time.perf_counter() - began)
    with writing_file(arguments.out, REMEDY) as file:
        if arguments.out.suffix == ".npz":
            np.savez(file, images=images, **({} if labels is None else {"labels": labels}))  # type: ignore[arg-type]
        else:
            write_png(file, picture(images))
    drawn = f"{len(images)} images in {steps} steps ({arguments.sampler}), {rate:.4g} images/s,"
    print(f"{drawn} from {saved.folder} -> {arguments.out}")


if __name__ == "__main__":
    run_command(main)
