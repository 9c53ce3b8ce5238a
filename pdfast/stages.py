"""The stages of a run: the teacher's training or conversion, its evaluation, each student's evaluation and folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdfast.config import DistillConfig, RunConfig
from pdfast.data import ImageSource, codec_of, load_source
from pdfast.engine.log import RunLog
from pdfast.engine.loop import RESUME_HINT, Optimization, Stage, Trainer
from pdfast.engine.machine import Machine
from pdfast.evaluation.evaluator import Evaluator, shown
from pdfast.evaluation.guard import complaints
from pdfast.evaluation.stored import read_metrics, read_reference
from pdfast.io.errors import Interrupted, UsageError
from pdfast.io.files import sealed, write_folder, write_json
from pdfast.io.grids import image_grid, write_png
from pdfast.io.text import count_steps
from pdfast.methods import Denoise, Reparameterize
from pdfast.networks import Network
from pdfast.networks.converted import ConvertedConfig, regular_angles
from pdfast.pretrained.model_folder import SavedModel, check_model, fill_model_folder

CONVERSION_STEPS = (16, 4, 1)
"""Steps at which a teacher is evaluated before it is converted, besides those that distillation starts from."""


def open_data(config: RunConfig, device: torch.device) -> ImageSource:
    """Return the run's images on the device. UsageError where they do not fit the network."""
    network = config.network
    height, width, channels = codec_of(network).data_shape(network.image_shape)
    return load_source(
        config.data,
        image_size=(height, width),
        channels=channels,
        device=device,
        num_classes=network.num_classes,
        loader=config.loader,
        max_bad=config.max_bad,
    )


def open_evaluator(config: RunConfig, machine: Machine, source: ImageSource) -> Evaluator:
    """Return the run's evaluator; it stops between steps where the run was asked to."""
    machine.watchdog.begin()

    def between() -> None:
        if machine.asked_to_stop("the evaluation"):
            raise Interrupted(f"stopped; {RESUME_HINT}")  # what is not in a checkpoint is made again

    return Evaluator(
        config.evaluation,
        source,
        config.schedule.build(),
        seed=config.seed,
        world=machine.world,
        between=between,
    )


def say_what_begins(config: RunConfig, machine: Machine, source: ImageSource, log: RunLog) -> None:
    """The first lines of a run's log."""
    log.say(f"{source.description}; run folder {config.run}")
    if source.num_classes < config.network.num_classes:
        log.say(
            f"the network takes {config.network.num_classes} classes: the data have labels below {source.num_classes}"
        )
    if source.num_classes and not config.network.num_classes:
        log.say(f"the network takes no classes: those of the data, {source.num_classes}, are not used")
    log.say(machine.description)
    log.watch(source)


def train_teacher(config: RunConfig, machine: Machine, source: ImageSource, log: RunLog) -> tuple[Network, dict]:
    """Train a teacher, or go on with it; return its network, with the EMA weights, and the training's figures.

    The initial weights are a function of the seed; dropout is one of the seed, the update and the process.
    """
    torch.manual_seed(config.seed)
    network = machine.prepare_student(config.network.build(config.train.dropout))
    method = Denoise(
        network,
        config.schedule.build(),
        config.train.weighting,
        machine.compile_function,
        config.train.label_dropout,
    )
    trainer = Trainer(method, Optimization.of_teacher(config.train), config, machine, source, log)
    training = trainer.train(Stage(config.train.updates))
    return network.eval().requires_grad_(False), training


def convert_teacher(
    config: DistillConfig,
    original: SavedModel,
    machine: Machine,
    source: ImageSource,
    evaluator: Evaluator,
    log: RunLog,
) -> tuple[Network, dict | None, dict]:
    """Return a copy of the teacher that predicts v, trained for where its algebra is not exact; with the figures of the
    training (None where there was none), and those of the original and of the untrained copy."""
    copy = ConvertedConfig(original.config).build()
    copy.network.load_state_dict(original.network.state_dict())
    evaluated: dict[str, list] = {"original": [], "untrained": []}
    networks: dict[str, Network] = {"original": original.network, "untrained": copy}
    try:
        dataclasses.replace(original, schedule=config.schedule).check_start()
    except UsageError as error:
        log.say(f"the original teacher is not evaluated: {error}")
        del networks["original"]
    for name, network in networks.items():
        network.to(machine.world.device).eval().dtype = machine.dtype
        for steps in [config.first_steps, *(n for n in CONVERSION_STEPS if n < config.first_steps)]:
            images, seconds = evaluator.draw(network, steps)
            row = evaluator.measure(images, steps, seconds)
            evaluated[name].append(row)
            log.say(f"{name} teacher, DDIM at {count_steps(steps)}: {evaluator.feature_space} {row['fd']:.3f}")
    end = float(config.schedule.build().phi(torch.ones((), dtype=torch.float64)))
    regular = regular_angles(original.config.prediction, end)
    if regular == (0.0, end):
        log.say("the copy is exact everywhere: it needs no training")
        return machine.prepare_student(copy), None, {"from": original.config.prediction, **evaluated}
    network = machine.prepare_student(copy)
    method = Reparameterize(network, original.network, regular, end, machine.compile_function)
    optimization = Optimization(
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        clip=config.clip,
        ema=min(config.train.ema, 0.999),
        warmup=min(100, config.convert_updates // 10),
        decay=0.5,
    )
    training = Trainer(method, optimization, config, machine, source, log).train(Stage(config.convert_updates))
    return network.eval().requires_grad_(False), training, {"from": original.config.prediction, **evaluated}


def write_teacher(
    config: RunConfig,
    machine: Machine,
    network: Network,
    training: dict | None,
    evaluator: Evaluator,
    step_counts: Sequence[int],
    log: RunLog,
    conversion: dict | None = None,
) -> None:
    """Evaluate the teacher by DDIM at the step counts and write runs/NAME/teacher, whole or not at all.

    What it draws at the first count is the reference that all later images are compared with. conversion: what is known of
    the network that it was made from.
    """
    rows, samples = [], np.empty(0)
    reference: Tensor | None = None
    for steps in step_counts:
        images, seconds = evaluator.draw(network, steps)
        if reference is None:
            reference, samples = images, shown(images)
            evaluator.set_reference(images)
        rows.append(evaluator.measure(images, steps, seconds))
        log.say(f"teacher, DDIM at {count_steps(steps)}: {evaluator.feature_space} {rows[-1]['fd']:.3f}")
    weights = machine.whole_weights(network)

    def fill(folder):
        fill_model_folder(folder, weights, network.config, config.schedule, None)
        made = {} if conversion is None else {"conversion": conversion}
        write_json(folder / "metrics.json", sealed(evaluator.metrics(rows, training) | made))
        np.save(folder / "samples.npy", samples)
        np.save(folder / "real.npy", evaluator.real_samples())
        np.save(folder / "reference.npy", reference.numpy())
        write_png(folder / "grid.png", image_grid(samples, columns=4, scale=4))

    machine.write_with_retry(lambda: write_folder(config.folder.teacher, fill))
    log.images(samples, step_counts[0])
    Stage(0).checkpoints(config, machine).clear()


def write_student(trainer: Trainer, training: dict, evaluator: Evaluator, stage: Stage, before: Path) -> None:
    """Evaluate the student at its step count and write runs/NAME/students/NNNN, whole or not at all.

    before: the folder of the model that it was distilled from.
    """
    config, machine, log, student = trainer.config, trainer.machine, trainer.log, trainer.method.student
    steps = stage.steps
    assert isinstance(config, DistillConfig) and steps is not None
    images, seconds = evaluator.draw(student.eval(), steps)
    row = evaluator.measure(images, steps, seconds)
    samples = shown(images)
    teacher_rows = read_metrics(config.folder.teacher)["evaluation"]
    row_before = read_metrics(before)["evaluation"][0]
    for complaint in complaints(row, row_before, teacher_rows, config.guard):
        log.warn(complaint, steps)
    weights = machine.whole_weights(student)

    def fill(folder):
        fill_model_folder(folder, weights, student.config, config.schedule, steps)
        write_json(folder / "metrics.json", sealed(evaluator.metrics([row], training)))
        np.save(folder / "samples.npy", samples)
        write_png(folder / "grid.png", image_grid(samples, columns=4, scale=4))

    machine.write_with_retry(lambda: write_folder(config.folder.student(steps), fill))
    stage.checkpoints(config, machine).clear()
    log.images(samples, steps)
    ddim = next((f", the teacher's DDIM {r['fd']:.3f}" for r in teacher_rows if r["steps"] == steps), "")
    log.say(f"student, {count_steps(steps)}: {evaluator.feature_space} {row['fd']:.3f}{ddim}")


def check_finished(config: DistillConfig, shape: tuple[int, ...]) -> None:
    """Raise a UsageError where the model of a finished stage, or the metrics or images that later ones are compared with, are
    not what was written."""
    teacher, last = config.folder.teacher, config.folder.student(config.round_steps[-1])
    for folder in (teacher, *map(config.folder.student, config.round_steps)):
        if folder.exists():
            check_model(folder)
            read_metrics(folder)
    if teacher.exists() and not last.exists():
        read_reference(teacher, shape)


def total_seconds(config: DistillConfig) -> float:
    """Return seconds of training in all stages of the run, over all resumes."""
    folders = [config.folder.teacher, *map(config.folder.student, config.round_steps)]
    trainings = [read_metrics(folder)["training"] for folder in folders]
    return sum(training["seconds"] for training in trainings if training)
