"""Progressive Distillation (Salimans & Ho 2022, Algorithm 2): halve a diffusion model's sampling steps, round by round.

    torchrun --standalone -m pdfast.distill --rounds 8

Without --teacher the preset's teacher is trained first. The same command run again resumes. The run's folder ends with
students/NNNN for every step count and report.html.
"""

import dataclasses
import functools
from pathlib import Path
from typing import cast

import numpy as np
import torch

from pdfast.checks import check_evaluation, check_job, check_plan
from pdfast.cli import Interrupted, run_command
from pdfast.commands import distill_arguments
from pdfast.config import DistillConfig, TeacherConfig
from pdfast.data import ImageSource
from pdfast.diffusion import build_step_table
from pdfast.engine import interrupt, layout
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.device import open_device
from pdfast.engine.files import sealed, write_folder, write_json
from pdfast.engine.log import Progress, RunLog, clock, count_steps
from pdfast.engine.machine import Machine, open_machine
from pdfast.engine.metrics import Losses
from pdfast.engine.model_folder import SavedModel, check_model, fill_model_folder, load_model
from pdfast.engine.optimizer import linear_decay
from pdfast.engine.run import check_place, open_run
from pdfast.engine.step import Draws, RoundTable, conversion_gradient, distillation_gradient
from pdfast.errors import RunError, UsageError
from pdfast.networks import Network, NetworkConfig
from pdfast.reading import read_json
from pdfast.report.evaluator import Evaluator, shown
from pdfast.report.grids import image_grid, write_png
from pdfast.report.guard import complaints
from pdfast.report.html import build_report
from pdfast.report.plan import print_distillation_plan
from pdfast.report.stored import read_metrics, read_reference
from pdfast.teachers import ConvertedConfig
from pdfast.teachers.convert import regular_angles
from pdfast.train import (
    HINT,
    new_network,
    open_data,
    open_evaluator,
    say_what_begins,
    train_teacher,
    write_teacher,
)

FEW = (16, 4, 1)
"""Steps at which a teacher is judged before it is converted, besides those that distillation starts from."""
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How near a student's output must be to its teacher's before the first update, of the largest value."""
COMPARED = 8  # images of each process


class Rounds:
    """The networks and everything else that serves all rounds, where it lies: graphs and compiled code stay valid."""

    def __init__(self, config: DistillConfig, machine: Machine, source: ImageSource, log: RunLog) -> None:
        self.config, self.machine, self.log = config, machine, log
        self.student, self.teacher = machine.trained(config.network.build()), machine.frozen()
        self.optimizer = machine.optimizer(self.student, clip=config.clip, ema=config.ema)
        self.draws = Draws(
            source,
            machine.world,
            seed=config.seed,
            batch_size=config.batch_size,
            flip=config.flip,
            conditional=config.network.num_classes > 0,
        )
        self.table = RoundTable(self._table(config.round_steps[0]))
        self.losses = Losses(machine.world)
        self.run_update = machine.replayed(self._update)

    def _table(self, steps: int):
        config = self.config
        schedule, device = config.schedule.build(), self.machine.world.device
        return build_step_table(schedule, steps, config.network.prediction, config.weighting, device=device)

    def _update(self) -> None:
        micro_batches = self.config.engine.micro_batches
        losses, k = distillation_gradient(
            self.student, self.teacher, self.draws, self.table, micro_batches, self.machine.compiled
        )
        self.losses.add(losses, k, self.table.count)
        self.optimizer.step(losses.mean())

    def begin(self, last: Path, round_index: int, steps: int) -> None:
        """Give student and teacher the weights of the model in folder `last`; RunError unless they then say the same."""
        world = self.machine.world
        weights = load_model(last, torch.device("cpu")).network.state_dict()
        self.teacher_sha256 = read_json(last / "config.json")["sha256"]
        for network in (self.student, self.teacher):
            layout.set_weights(network, weights, world)
        self.optimizer.reset()
        self.table.set(self._table(steps))
        self.draws.load(round_index, 0)
        self.student.train()
        if world.any(self._differ())[0]:
            raise RunError(
                f"before the round to {count_steps(steps)} the student is not its teacher: this is a bug, report it"
            )

    @torch.no_grad()
    def _differ(self) -> bool:
        """Tell whether the outputs of student and teacher differ for a few images. Neither compiled nor with a gradient: beside
        the CUDA graph of the round before there is no memory for another update."""
        phi = self.table.rows.phi[self.draws.step_indices(self.table.count) - 1]
        few = slice(min(COMPARED, len(phi) // self.config.engine.micro_batches))
        labels = None if self.draws.labels is None else self.draws.labels[few]
        z = self.draws.diffused(phi)[few]
        with torch.compiler.set_stance("force_eager"):
            theirs, ours = (network(z, phi[few], labels) for network in (self.teacher, self.student))
        return bool((ours - theirs).abs().max() > SAME[self.machine.dtype] * theirs.abs().max())

    def train(self, round_index: int, steps: int) -> dict:
        """One round: the student learns to do in `steps` steps what its teacher does in twice as many. Returns the round's
        figures; the student then has the weights that count."""
        config, machine, optimizer, log = self.config, self.machine, self.optimizer, self.log
        updates = config.updates_at(steps)
        checkpoints = Checkpoints(config.run, f"student-{steps:04d}", machine.world)
        checkpoint = checkpoints.latest()
        start, seconds = 0, 0.0
        if checkpoint:
            if checkpoint.extra["teacher_sha256"] != self.teacher_sha256:
                raise UsageError(
                    f"the round to {count_steps(steps)} in {config.run} was begun from another teacher than there is now: "
                    "restore that one, or delete the round's checkpoints to start it again"
                )
            optimizer.load_state(checkpoint.tensors)
            self.losses.load_state(checkpoint.tensors)
            start, seconds = checkpoint.update, checkpoint.extra["seconds"]
            log.say(f"resuming the round to {count_steps(steps)} at update {start}")
        log.forget_after(steps, start)

        progress = Progress(
            log,
            self.losses,
            machine.speed(config.batch_size, evaluations_per_image=3, forwards_of_flops=5),
            optimizer,
            self.draws,
            phase="distill",
            steps=steps,
            start=start,
            updates=updates,
            seconds=seconds,
            every=config.log_every,
        )
        where = f"the round to {count_steps(steps)}"
        for update in range(start, updates):
            learning_rate = config.learning_rate * linear_decay(update, updates)
            self.draws.load(round_index, update)
            optimizer.set(update, learning_rate)
            self.run_update()  # both teachers, the student and its backward, clip, Adam, average: see _update
            progress.update(update + 1, learning_rate)
            machine.stop_if_not_finite(optimizer, self.losses, update, where, config.log_every)
            stopping = machine.asked_to_stop(f"update {update + 1} of {where}")
            if stopping or (update + 1) % config.checkpoint_every == 0 or update + 1 == updates:
                extra = {
                    "seconds": progress.seconds,
                    "round": round_index,
                    "samples": (update + 1) * config.batch_size,
                    "teacher_sha256": self.teacher_sha256,
                }
                checkpoints.save(update + 1, optimizer.state(), optimizer.counters() | self.losses.state(), extra)
            checkpoints.poll()
            if stopping:
                checkpoints.finish()
                progress.close()
                raise Interrupted(f"stopped at update {update + 1} of {where} and saved it; {HINT}")
        checkpoints.finish()
        progress.close()
        optimizer.publish()
        images = updates * config.batch_size
        return {
            "updates": updates,
            "images": images,
            "seconds": progress.seconds,
            "images_per_second": images / max(progress.seconds, 1e-9),
            "network_evaluations": 3 * images,
            "skipped": int(optimizer.skipped[0]),
        }


def write_student(rounds: Rounds, training: dict, evaluator: Evaluator, steps: int) -> None:
    """Judge the student at its step count and write runs/NAME/students/NNNN, whole or not at all."""
    config, machine, log = rounds.config, rounds.machine, rounds.log
    images, seconds = evaluator.draw(rounds.student.eval(), steps)
    row = evaluator.measure(images, steps, seconds)
    samples = shown(images)
    teacher_rows = read_metrics(config.run / "teacher")["evaluation"]
    before = config.run / "students" / f"{2 * steps:04d}"
    row_before = read_metrics(before)["evaluation"][0] if before.exists() else teacher_rows[0]
    for complaint in complaints(row, row_before, teacher_rows, config.guard):
        log.warn(complaint, steps)
    weights = machine.whole_weights(rounds.student)

    def fill(folder):
        fill_model_folder(folder, weights, config.network, config.schedule, steps)
        write_json(folder / "metrics.json", sealed(evaluator.metrics([row], training)))
        np.save(folder / "samples.npy", samples)
        write_png(folder / "grid.png", image_grid(samples, columns=4, scale=4))

    machine.finish(lambda: write_folder(config.run / "students" / f"{steps:04d}", fill))
    Checkpoints(config.run, f"student-{steps:04d}", machine.world).clear()
    log.images(samples, steps)
    ddim = next((f", the teacher's DDIM {r['fd']:.3f}" for r in teacher_rows if r["steps"] == steps), "")
    log.say(f"student, {count_steps(steps)}: {evaluator.feature_space} {row['fd']:.3f}{ddim}")


def with_teachers_network(config: DistillConfig) -> tuple[DistillConfig, SavedModel | None]:
    """The configuration with the network and schedule of --teacher, and that teacher, on the CPU (None where none was
    given)."""
    if config.teacher is None:
        return config, None
    saved = load_model(config.teacher, torch.device("cpu"))
    if saved.steps is not None and saved.steps != config.start_steps:
        raise UsageError(
            f"{config.teacher} is a student of {saved.steps} steps: distill it from there, with --start-steps {saved.steps}"
        )
    try:
        network = ConvertedConfig(saved.config) if config.convert else saved.config
    except ValueError as error:
        raise UsageError(f"--convert {config.convert}, {config.teacher}: {error}") from None
    schedule = saved.schedule
    if config.schedule.u_start != 1:
        schedule = dataclasses.replace(schedule, u_start=config.schedule.u_start)
    # --network has flags for our U-Net; the configurations of other networks have what is read of one besides.
    return dataclasses.replace(config, network=cast(NetworkConfig, network), schedule=schedule), saved


def convert_teacher(
    config: DistillConfig,
    original: SavedModel,
    machine: Machine,
    source: ImageSource,
    evaluator: Evaluator,
    log: RunLog,
) -> tuple[Network, dict | None, dict]:
    """A copy of the teacher that predicts v, trained for where its algebra is not exact; with the figures of the training
    (None where there was none), and those of the original and of the untrained copy."""
    copy = ConvertedConfig(original.config).build()
    copy.network.load_state_dict(original.network.state_dict())
    judged: dict[str, list] = {"original": [], "untrained": []}
    networks: dict[str, Network] = {"original": original.network, "untrained": copy}
    try:
        dataclasses.replace(original, schedule=config.schedule).check_start()
    except UsageError as error:
        log.say(f"the original teacher is not judged: {error}")
        del networks["original"]
    for name, network in networks.items():
        network.to(machine.world.device).eval().dtype = machine.dtype
        for steps in [config.first_steps, *(n for n in FEW if n < config.first_steps)]:
            images, seconds = evaluator.draw(network, steps)
            row = evaluator.measure(images, steps, seconds)
            judged[name].append(row)
            log.say(f"{name} teacher, DDIM at {count_steps(steps)}: {evaluator.feature_space} {row['fd']:.3f}")
    end = float(config.schedule.build().phi(torch.ones((), dtype=torch.float64)))
    regular = regular_angles(original.config.prediction, end)
    if regular == (0.0, end):
        log.say("the copy is exact everywhere: it needs no training")
        return machine.trained(copy), None, {"from": original.config.prediction, **judged}
    settings = TeacherConfig(
        updates=config.convert_updates,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup=min(100, config.convert_updates // 10),
        decay=0.5,
        ema=min(config.train.ema, 0.999),
        clip=config.clip,
    )
    gradient = functools.partial(
        conversion_gradient,
        original=original.network,
        regular=regular,
        end=end,
        micro_batches=config.engine.micro_batches,
        compiled=machine.compiled,
    )
    network, training = train_teacher(config, copy, settings, machine, source, log, gradient)
    return network, training, {"from": original.config.prediction, **judged}


def check_finished(config: DistillConfig, shape: tuple[int, ...]) -> None:
    """Raise a UsageError where the model of a finished stage, or the metrics or images that later ones are compared with, are
    not what was written."""
    teacher, last = config.run / "teacher", config.run / "students" / f"{config.end_steps:04d}"
    for folder in (teacher, *(config.run / "students" / f"{steps:04d}" for steps in config.round_steps)):
        if folder.exists():
            check_model(folder)
            read_metrics(folder)
    if teacher.exists() and not last.exists():
        read_reference(teacher, shape)


def distill(
    config: DistillConfig, machine: Machine, given_teacher: SavedModel | None, source: ImageSource, log: RunLog
) -> None:
    """All of a run: the teacher, then round after round, each stage skipped where its folder is already there."""
    world = machine.world
    teacher_folder = config.run / "teacher"
    shape = (config.evaluation.num_samples, *config.network.image_shape)
    world.on_first(lambda: check_finished(config, shape))
    evaluator: Evaluator | None = None
    training = conversion = None
    if not world.on_first(teacher_folder.exists):
        if given_teacher is None:
            teacher, training = train_teacher(config, new_network(config), config.train, machine, source, log)
            evaluator = open_evaluator(config, machine, source)
        elif config.convert:
            evaluator = open_evaluator(config, machine, source)
            teacher, training, conversion = convert_teacher(config, given_teacher, machine, source, evaluator, log)
        else:
            teacher = machine.trained(given_teacher.network)
            evaluator = open_evaluator(config, machine, source)
        halvings = [config.first_steps, *(n for n in config.round_steps if n <= config.evaluation.max_steps)]
        write_teacher(config, machine, teacher, training, evaluator, halvings, log, conversion)
        machine.finish(lambda: build_report(config.run))
        del teacher

    last = teacher_folder
    rounds: Rounds | None = None
    for round_index, steps in enumerate(config.round_steps, start=1):
        folder = config.run / "students" / f"{steps:04d}"
        if not world.on_first(folder.exists):
            rounds = rounds or Rounds(config, machine, source, log)
            rounds.begin(last, round_index, steps)
            training = rounds.train(round_index, steps)
            if evaluator is None:
                evaluator = open_evaluator(config, machine, source)
                evaluator.set_reference(torch.from_numpy(read_reference(teacher_folder, shape)))
            write_student(rounds, training, evaluator, steps)
            if steps != config.end_steps:
                machine.finish(lambda: build_report(config.run))
        last = folder

    machine.finish(lambda: build_report(config.run))
    log.say(f"finished, {clock(total_seconds(config))} of training; open {config.run / 'report.html'}")


def total_seconds(config: DistillConfig) -> float:
    """Seconds of training in all stages of the run, over all resumes."""
    folders = [config.run / "teacher", *(config.run / "students" / f"{n:04d}" for n in config.round_steps)]
    trainings = [read_metrics(folder)["training"] for folder in folders]
    return sum(training["seconds"] for training in trainings if training)


def main() -> None:
    config, extra = distill_arguments()
    check_place(config.run)
    config, given_teacher = with_teachers_network(config)
    check_job(config)
    if extra.dry_run:
        check_plan(config)
        print_distillation_plan(config, open_device(config.device))
        return
    with open_machine(config) as machine:
        source = open_data(config, machine.world.device)
        check_evaluation(config.evaluation, source)
        with open_run(config, source, machine.world, given_teacher), RunLog(config.run, machine.world) as log:
            interrupt.install()
            say_what_begins(config, machine, source, log)
            distill(config, machine, given_teacher, source, log)
            log.count_bad_images()


if __name__ == "__main__":
    run_command(main)
