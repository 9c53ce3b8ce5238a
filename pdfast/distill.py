"""Progressive Distillation (Salimans & Ho 2022, Algorithm 2): halve a diffusion model's sampling steps, round by round.

    torchrun --standalone -m pdfast.distill --rounds 8

Without --teacher the preset's teacher is trained first. The same command run again resumes. The run's folder ends with
students/NNNN for every step count and report.html.
"""

import dataclasses

import numpy as np
import torch

from pdfast.cli import Interrupted, run_command
from pdfast.commands import distill_arguments
from pdfast.config import DistillConfig
from pdfast.data import ImageSource
from pdfast.diffusion import build_step_table
from pdfast.engine import interrupt
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.device import open_device
from pdfast.engine.files import write_folder, write_json
from pdfast.engine.log import Progress, RunLog, clock, count_steps
from pdfast.engine.model_folder import fill_model_folder, load_model, read_json
from pdfast.engine.optimizer import Optimizer, linear_decay
from pdfast.engine.run import open_run
from pdfast.engine.step import Draws, distillation_loss
from pdfast.errors import UsageError
from pdfast.networks import UNet
from pdfast.report.evaluator import Evaluator, shown
from pdfast.report.grids import image_grid, write_png
from pdfast.report.html import build_report
from pdfast.report.plan import print_distillation_plan
from pdfast.train import HINT, open_data, open_evaluator, refuse_eps_at_the_start, train_teacher, write_teacher


def distill_round(
    config: DistillConfig,
    teacher: UNet,
    round_index: int,
    steps: int,
    source: ImageSource,
    log: RunLog,
    device: torch.device,
) -> tuple[UNet, dict]:
    """One round: a student of `steps` steps learns to do what `teacher` does in twice as many. Returns the student and the
    round's figures."""
    updates = config.updates_at(steps)
    student = UNet(config.network).to(device)
    student.load_state_dict(teacher.state_dict())
    optimizer = Optimizer(student, clip=config.clip, ema=config.ema)
    table = build_step_table(config.schedule.build(), steps, config.network.prediction, config.weighting, device=device)
    draws = Draws(source, config.seed, round_index, config.batch_size, config.flip, device)
    conditional = config.network.num_classes > 0

    checkpoints = Checkpoints(config.run, f"student-{steps:04d}")
    checkpoint = checkpoints.latest()
    start, seconds = 0, 0.0
    if checkpoint:
        optimizer.load_state(checkpoint.tensors)
        start, seconds = checkpoint.update, checkpoint.extra["seconds"]
        log.say(f"resuming the round to {count_steps(steps)} at update {start}")
    log.forget_after(steps, start)

    progress = Progress(
        log,
        phase="distill",
        steps=steps,
        start=start,
        updates=updates,
        seconds=seconds,
        batch_size=config.batch_size,
        every=config.log_every,
    )
    student.train()
    for update in range(start, updates):
        learning_rate = config.learning_rate * linear_decay(update, updates)
        loss = distillation_loss(student, teacher, draws, update, table, conditional)
        norm = optimizer.step(loss, learning_rate, update, f"the round to {count_steps(steps)}")
        progress.update(update + 1, loss, norm, learning_rate)
        stopping = interrupt.requested()
        if stopping or (update + 1) % config.checkpoint_every == 0 or update + 1 == updates:
            checkpoints.save(update + 1, optimizer.state(), {"seconds": progress.seconds})
        if stopping:
            progress.close()
            raise Interrupted(
                f"stopped at update {update + 1} of the round to {count_steps(steps)} and saved it; {HINT}"
            )
    progress.close()

    student.load_state_dict(optimizer.weights())
    images = updates * config.batch_size
    training = {
        "updates": updates,
        "images": images,
        "seconds": progress.seconds,
        "images_per_second": images / max(progress.seconds, 1e-9),
        "network_evaluations": 3 * images,
    }
    return student.eval().requires_grad_(False), training


def write_student(
    config: DistillConfig, student: UNet, training: dict, evaluator: Evaluator, steps: int, log: RunLog
) -> None:
    """Judge the student at its step count and write runs/NAME/students/NNNN, whole or not at all."""
    images, seconds = evaluator.draw(student, steps)
    row = evaluator.measure(images, steps, seconds)
    samples = shown(images)

    def fill(folder):
        fill_model_folder(folder, student.state_dict(), config.network, config.schedule, steps)
        write_json(folder / "metrics.json", evaluator.metrics([row], training))
        np.save(folder / "samples.npy", samples)
        write_png(folder / "grid.png", image_grid(samples, columns=4, scale=4))

    write_folder(config.run / "students" / f"{steps:04d}", fill)
    Checkpoints(config.run, f"student-{steps:04d}").clear()
    log.board.add_images("samples", samples, steps, dataformats="NHWC")
    teacher_rows = read_json(config.run / "teacher" / "metrics.json")["evaluation"]
    ddim = next((f", the teacher's DDIM {r['fd']:.3f}" for r in teacher_rows if r["steps"] == steps), "")
    log.say(f"student, {count_steps(steps)}: {evaluator.feature_space} {row['fd']:.3f}{ddim}")


def with_teachers_network(config: DistillConfig, device: torch.device) -> tuple[DistillConfig, UNet | None]:
    """The configuration with the network and schedule of --teacher, and that teacher (None where none was given)."""
    if config.teacher is None:
        return config, None
    saved = load_model(config.teacher, device)
    if saved.network.config.image_shape != config.network.image_shape:
        raise UsageError(
            f"the teacher in {config.teacher} makes images of (channels, height, width) {saved.network.config.image_shape}, "
            f"the data are {config.network.image_shape}: choose other --data or set --network.image-size and "
            "--network.image-channels"
        )
    if saved.steps is not None and saved.steps != config.start_steps:
        raise UsageError(
            f"{config.teacher} is a student of {saved.steps} steps: distill it from there, with --start-steps {saved.steps}"
        )
    return dataclasses.replace(config, network=saved.network.config, schedule=saved.schedule), saved.network


def distill(
    config: DistillConfig, given_teacher: UNet | None, source: ImageSource, log: RunLog, device: torch.device
) -> None:
    """All of a run: the teacher, then round after round, each stage skipped where its folder is already there."""
    teacher_folder = config.run / "teacher"
    evaluator: Evaluator | None = None
    if not teacher_folder.exists():
        if given_teacher is None:
            teacher, training = train_teacher(config, source, log, device)
        else:
            teacher, training = given_teacher, None
        evaluator = open_evaluator(config, source, device)
        halvings = [config.start_steps, *(n for n in config.round_steps if n <= config.evaluation.max_steps)]
        write_teacher(config, teacher, training, evaluator, halvings, log)
        build_report(config.run)

    teacher = load_model(teacher_folder, device).network
    for round_index, steps in enumerate(config.round_steps, start=1):
        folder = config.run / "students" / f"{steps:04d}"
        if not folder.exists():
            student, training = distill_round(config, teacher, round_index, steps, source, log, device)
            if evaluator is None:
                evaluator = open_evaluator(config, source, device)
                evaluator.set_reference(torch.from_numpy(np.load(teacher_folder / "reference.npy")))
            write_student(config, student, training, evaluator, steps, log)
            build_report(config.run)
        teacher = load_model(folder, device).network

    log.say(f"finished, {clock(total_seconds(config))} of training; open {build_report(config.run)}")


def total_seconds(config: DistillConfig) -> float:
    """Seconds of training in all stages of the run, over all resumes."""
    folders = [config.run / "teacher", *(config.run / "students" / f"{n:04d}" for n in config.round_steps)]
    trainings = [read_json(folder / "metrics.json")["training"] for folder in folders]
    return sum(training["seconds"] for training in trainings if training)


def main() -> None:
    config, extra = distill_arguments()
    device = open_device(config.device)
    config, given_teacher = with_teachers_network(config, device)
    refuse_eps_at_the_start(config)
    if extra.dry_run:
        print_distillation_plan(config, device)
        return
    source = open_data(config, device)
    with open_run(config, source), RunLog(config.run) as log:
        interrupt.install()
        log.say(f"{source.name}: {source.num_images} images of {source.shape}; run folder {config.run}")
        distill(config, given_teacher, source, log, device)


if __name__ == "__main__":
    run_command(main)
