"""Judge a run's models, or one model's folder, at given step counts.

    python -m pdfast.evaluate runs/digits --steps 4 2 1
    python -m pdfast.evaluate runs/digits/teacher --steps 256 16 --data digits --json out.json

Every model draws from the same noise. The last row compares real images with as many other real ones: what a perfect model would
reach; there is none where all real images are compared with.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from pdfast import own_code
from pdfast.checks import check_evaluation, check_once
from pdfast.cli import parse, run_command
from pdfast.config import DistillConfig, EvaluationConfig, Reference, RunConfig
from pdfast.data import codec_of, load_source
from pdfast.engine import parallelize
from pdfast.engine.device import open_device
from pdfast.engine.run import changed_data
from pdfast.engine.world import World
from pdfast.evaluation.evaluator import Evaluator
from pdfast.evaluation.metrics import in_words
from pdfast.evaluation.stored import read_reference
from pdfast.flags import OptionalInt, OptionalPath, OptionalString, Positional, arg
from pdfast.io.bounds import BATCH, SAMPLES, SEED, STEPS, require
from pdfast.io.errors import UsageError
from pdfast.io.files import check_file, write_json
from pdfast.io.plain import fields_of, structure
from pdfast.io.reading import load_yaml, shown
from pdfast.io.run_folder import RunFolder
from pdfast.pretrained.model_folder import SavedModel, is_model, load_model

REMEDY = "choose another file with --json"


@dataclass(frozen=True)
class Arguments:
    """Judge a run's models, or one model's folder, at given step counts."""

    model: Annotated[Path, Positional]
    """A run's folder (its teacher and its students are evaluated), or a teacher's or student's folder."""
    steps: tuple[int, ...] = ()
    """Step counts; unless said those of the run's students, or the student's own."""
    data: OptionalString = None
    """The real images; unless said those of the run."""
    features: OptionalString = None
    """digits, mobilenet or a path to Inception weights; unless said as in the run."""
    num_samples: OptionalInt = None
    """Images to draw; unless said as in the run."""
    reference: Annotated[Reference | None, arg(metavar="{half,all}")] = None
    """Real images to compare with: half, as many as are drawn, and as many others for a floor; all, as for the FIDs that papers
    report, without a floor; unless said as in the run."""
    guidance: tuple[float, ...] = ()
    """Classifier-free guidance at which all models are evaluated, one after the other, and compared with the run's teacher at the same; of
    models that take it as an input, or can be guided. Unless said as in the run: from a range, each image has its own."""
    clip: bool | None = None
    """Clip each x-prediction to [-1, 1]; unless said as in the run."""
    seed: OptionalInt = None
    """Seed of the noise that all models draw from; unless said that of the run, which gives its numbers again."""
    json: OptionalPath = None
    """Write the figures here as well."""
    network_from: OptionalString = None
    """package.module:function, for a network made by code of your own, which runs only where you name it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations; auto is bf16 on a GPU, fp32 on a CPU, as in a run."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the networks' blocks; auto is on for a GPU, off for a CPU."""


def run_of(folder: Path) -> dict[str, Any]:
    """Return the saved configuration of the run that `folder` is or lies in, {} where there is none."""
    for candidate in (folder, *folder.resolve().parents[:2]):
        file = RunFolder(candidate).config
        if file.exists():
            saved = load_yaml(file)
            return saved | fields_of(RunConfig, saved, ("data", "loader", "max_bad", "seed"), str(file))
    return {}


def evaluation_settings(arguments: Arguments, run: dict[str, Any]) -> EvaluationConfig:
    """Return the run's settings, overridden by flags. UsageError where neither says what features to use."""
    saved = run.get("evaluation", {})
    if not isinstance(saved, dict):
        raise UsageError(f"evaluation: expected fields, found {shown(saved)}")
    flags = {name: getattr(arguments, name) for name in ("features", "num_samples", "reference", "clip")}
    settings = structure(EvaluationConfig, saved | {k: v for k, v in flags.items() if v is not None}, "evaluation")
    if settings.batch_size not in BATCH:
        raise UsageError(f"evaluation: batch_size must be {BATCH.text}, got {settings.batch_size}")
    require("num-samples", settings.num_samples, SAMPLES)
    return settings


@contextmanager
def own_flags() -> Iterator[None]:
    """Name in a UsageError the flags of this command: those of a run's evaluation without their prefix; others it takes from the
    run's configuration."""
    try:
        yield
    except UsageError as error:
        text = str(error).replace("--evaluation.", "--").replace("--max-bad", "the run's max_bad")
        raise UsageError(text.replace("--loader", "the run's loader")) from None


def models_to_evaluate(arguments: Arguments, device: torch.device) -> list[tuple[str, SavedModel, int]]:
    """(name, model, steps) of everything to measure. UsageError where there is nothing."""
    folder = arguments.model
    if is_model(folder) or not folder.is_dir():
        saved = load_model(folder, device)
        name = "teacher" if saved.steps is None else f"student of {saved.steps}"
        counts = arguments.steps or ((saved.steps,) if saved.steps else (256, 16))
        return [(name, saved, n) for n in counts]
    run = RunFolder(folder)
    students = {steps: load_model(f, device) for steps, f in run.students().items()}
    teacher = load_model(run.teacher, device) if run.teacher.is_dir() else None
    counts = arguments.steps or tuple(sorted(students, reverse=True))
    wanted = [("student", students[n], n) for n in counts if n in students]
    wanted += [("teacher, DDIM", teacher, n) for n in counts if teacher]
    if not wanted:
        raise UsageError(
            f"nothing to evaluate in {folder}: it has students of {sorted(students) or 'no'} steps and "
            f"{'a' if teacher else 'no'} teacher; give --steps"
        )
    return wanted


def set_run_reference(evaluator: Evaluator, arguments: Arguments, run: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Compare with what the run's teacher drew from the same noise, where that is there: it is of the run's seed and number of images."""
    teacher = RunFolder(arguments.model).teacher
    same = (run.get("seed"), run.get("evaluation", {}).get("num_samples")) == (evaluator.seed, shape[0])
    if same and (teacher / "reference.npy").exists():
        evaluator.set_reference(torch.from_numpy(read_reference(teacher, shape)))


def set_guided_reference(evaluator: Evaluator, models: list[SavedModel], run: dict[str, Any], g: float) -> None:
    """Compare with what the run's teacher draws from the same noise at guidance g, in the steps that distillation starts from, where it is
    among the models."""
    steps = fields_of(DistillConfig, run, ("start_steps",), "the run's configuration").get("start_steps")
    teacher = next((saved for saved in models if saved.steps is None), None)
    if teacher is not None and steps is not None:
        evaluator.set_reference(evaluator.draw(teacher.at_guidance(g).network, steps)[0])


def _print_seeds(rows: list[dict[str, Any]]) -> None:
    """Print, where there was a teacher to compare with, what is near its images."""
    if all(row["feature_distance"] is None for row in rows):
        return
    print("\nnext to the teacher's images from the same noise")
    print(f"{'':<16} {'steps':>5} {'PSNR, dB':>9} {'distance':>9} {'diversity':>9} {'contrast':>9} {'saturation':>10}")
    for i, row in enumerate(rows):
        if row["guidance"] is not None and (i == 0 or row["guidance"] != rows[i - 1]["guidance"]):
            print(f"guidance {row['guidance']:g}")
        ratios = (in_words(row[name]) for name in ("diversity_ratio", "contrast_ratio"))
        cells = [in_words(row["psnr"]) if row["mse"] else "same", in_words(row["feature_distance"]), *ratios]
        line = f"{row['model']:<16} {row['steps']:>5} {' '.join(f'{cell:>9}' for cell in cells)}"
        print(f"{line} {in_words(row['saturation_ratio']):>10}")


def _line(*cells: str) -> str:
    name, steps, fd, kd, cs, precision, recall, time = cells
    return f"{name:<16} {steps:>5} {fd:>14} {kd:>20} {cs:>15} {precision:>9} {recall:>7} {time:>12}".rstrip()


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['fd']:.4f}",
        in_words(row["kd"], row["kd_std"]),
        in_words(row["cs"], row["cs_std"]),
        *(in_words(row[name]) for name in ("precision", "recall")),
    ]


def main() -> None:
    arguments = parse(Arguments, prog="python -m pdfast.evaluate", description=__doc__)
    own_code.allow(arguments.network_from)
    for steps in arguments.steps:
        require("steps", steps, STEPS)
    check_once("steps", arguments.steps)
    require("num-samples", arguments.num_samples, SAMPLES)
    if arguments.json is not None:
        check_file(arguments.json, REMEDY)
    device = open_device(arguments.device)
    run = run_of(arguments.model)
    settings = evaluation_settings(arguments, run)
    wanted = models_to_evaluate(arguments, device)
    data = arguments.data or run.get("data")
    seed = run.get("seed", 0) if arguments.seed is None else arguments.seed
    require("seed", seed, SEED)
    if data is None:
        raise UsageError(f"{arguments.model} is not in a run's folder: say what to compare with, --data and --features")
    first = wanted[0][1]
    for _, saved, _ in wanted:
        saved.check_start()
        for g in arguments.guidance:
            saved.at_guidance(g)
    height, width, channels = codec_of(first.config).data_shape(first.config.image_shape)
    with own_flags():
        source = load_source(
            data,
            image_size=(height, width),
            channels=channels,
            device=device,
            loader=run.get("loader", "auto") if data == run.get("data") else "auto",
            max_bad=run.get("max_bad", RunConfig.max_bad),
        )
        check_evaluation(settings, source)
    for network in {id(saved): saved.network for _, saved, _ in wanted}.values():
        parallelize.for_sampling(network, device, arguments.dtype, arguments.compile)
    if arguments.data is None and (changed := changed_data(run, source)):
        warnings.warn(
            f"{data} holds other {changed} than {arguments.model} was trained on: these figures are next to them, not to those of "
            "its report",
            stacklevel=2,
        )
    evaluator = Evaluator(
        settings,
        source,
        first.schedule.build(),
        seed=seed,
        world=World(device),
    )
    if not arguments.guidance:
        set_run_reference(evaluator, arguments, run, (settings.num_samples, *first.config.image_shape))
    rows = []
    print(_line("", "steps", *evaluator.names.values(), "precision", "recall", "ms a sample"))
    values: list[float | None] = [*arguments.guidance] or [None]
    for guidance in values:
        if guidance is not None:
            print(f"guidance {guidance:g}")
            set_guided_reference(evaluator, [saved for _, saved, _ in wanted], run, guidance)
        for name, saved, steps in wanted:
            images, seconds = evaluator.draw(saved.at_guidance(guidance).network, steps)
            row = {"model": name, "guidance": guidance} | evaluator.measure(images, steps, seconds)
            rows.append(row)
            print(_line(name, str(steps), *_figures(row), f"{1000 * seconds:.3g}"), flush=True)
    metrics = evaluator.metrics(rows, None)
    if metrics["real_against_real"] is not None:
        print(_line("real images", "", *_figures(metrics["real_against_real"]), ""))
    _print_seeds(rows)
    print(f"n = {metrics['num_samples']}, next to {metrics['num_real']} real images, {metrics['device']}")
    if arguments.json is not None:
        write_json(arguments.json, metrics, REMEDY)


if __name__ == "__main__":
    run_command(main)
