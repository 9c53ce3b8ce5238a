"""Train a teacher by Algorithm 1 of Salimans & Ho 2022.

    python -m pdfast.train --preset digits --run runs/my-teacher

The same command run again resumes. The result, runs/my-teacher/teacher, is what `pdfast.distill --teacher` takes.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pdfast.checks import check_evaluation, check_job, check_plan
from pdfast.cli import Interrupted, run_command
from pdfast.commands import train_arguments
from pdfast.config import RunConfig, TeacherConfig
from pdfast.data import ImageSource, load_source
from pdfast.engine import interrupt
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.device import open_device
from pdfast.engine.files import sealed, write_folder, write_json
from pdfast.engine.log import Progress, RunLog, count_steps
from pdfast.engine.machine import Machine, open_machine
from pdfast.engine.metrics import BUCKETS, Losses
from pdfast.engine.model_folder import fill_model_folder
from pdfast.engine.optimizer import linear_decay, linear_warmup
from pdfast.engine.run import check_place, open_run
from pdfast.engine.step import Draws, teacher_gradient
from pdfast.names import shell_word
from pdfast.networks import Network
from pdfast.report.evaluator import Evaluator, shown
from pdfast.report.grids import image_grid, write_png
from pdfast.report.plan import print_training_plan

HINT = "the same command goes on from here"


def new_network(config: RunConfig) -> Network:
    """A network whose initial weights are a function of the seed."""
    torch.manual_seed(config.seed)
    return config.network.build(config.train.dropout)


def train_teacher(
    config: RunConfig,
    network: Network,
    settings: TeacherConfig,
    machine: Machine,
    source: ImageSource,
    log: RunLog,
    gradient: Callable[[Network, Draws], Tensor] | None = None,
) -> tuple[Network, dict]:
    """Train (or go on training) a teacher; returns its network, with the averaged weights, and the training's figures.

    gradient: leaves the gradient of an update in the parameters and returns the losses [n]; Algorithm 1 unless said. Dropout is a function of the seed, the update and the process.
    """
    world = machine.world
    if gradient is None:
        gradient = functools.partial(
            teacher_gradient,
            schedule=config.schedule.build(),
            weighting=settings.weighting,
            micro_batches=config.engine.micro_batches,
            compiled=machine.compiled,
        )
    network = machine.trained(network)
    optimizer = machine.optimizer(network, clip=settings.clip, ema=settings.ema, weight_decay=settings.weight_decay)
    draws = Draws(
        source,
        world,
        seed=config.seed,
        batch_size=settings.batch_size,
        flip=config.flip,
        conditional=config.network.num_classes > 0,
    )
    losses = Losses(world)
    buckets = torch.full((), BUCKETS, device=world.device)

    def update_once() -> None:
        values = gradient(network, draws)
        losses.add(values, 1 + (draws.times() * BUCKETS).long(), buckets)
        optimizer.step(values.mean())

    checkpoints = Checkpoints(config.run, "teacher", world)
    checkpoint = checkpoints.latest()
    start, seconds = 0, 0.0
    if checkpoint:
        optimizer.load_state(checkpoint.tensors)
        losses.load_state(checkpoint.tensors)
        start, seconds = checkpoint.update, checkpoint.extra["seconds"]
        log.say(f"resuming the teacher at update {start}")
    log.forget_after(None, start)

    progress = Progress(
        log,
        losses,
        machine.speed(settings.batch_size, evaluations_per_image=1, forwards_of_flops=3),
        optimizer,
        draws,
        phase="teacher",
        steps=None,
        start=start,
        updates=settings.updates,
        seconds=seconds,
        every=config.log_every,
    )
    network.train()
    run_update = machine.replayed(update_once)
    for update in range(start, settings.updates):
        factor = linear_warmup(update, settings.warmup) * linear_decay(update, settings.updates, settings.decay)
        if settings.dropout:
            machine.seed_dropout(config.seed, update)
        draws.load(0, update)
        optimizer.set(update, settings.learning_rate * factor)
        run_update()
        progress.update(update + 1, settings.learning_rate * factor)
        machine.stop_if_not_finite(optimizer, losses, update, "teacher", config.log_every)
        stopping = machine.asked_to_stop(f"update {update + 1} of the teacher")
        if stopping or (update + 1) % config.checkpoint_every == 0 or update + 1 == settings.updates:
            extra = {"seconds": progress.seconds, "samples": (update + 1) * settings.batch_size}
            checkpoints.save(update + 1, optimizer.state(), optimizer.counters() | losses.state(), extra)
        checkpoints.poll()
        if stopping:
            checkpoints.finish()
            progress.close()
            raise Interrupted(f"stopped at update {update + 1} of the teacher and saved it; {HINT}")
    checkpoints.finish()
    progress.close()

    optimizer.publish()
    images = settings.updates * settings.batch_size
    training = {
        "updates": settings.updates,
        "images": images,
        "seconds": progress.seconds,
        "images_per_second": images / max(progress.seconds, 1e-9),
        "network_evaluations": images,
        "skipped": int(optimizer.skipped[0]),
    }
    return network.eval().requires_grad_(False), training


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
    """Judge the teacher by DDIM at the step counts and write runs/NAME/teacher, whole or not at all.

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
        fill_model_folder(folder, weights, config.network, config.schedule, None)
        made = {} if conversion is None else {"conversion": conversion}
        write_json(folder / "metrics.json", sealed(evaluator.metrics(rows, training) | made))
        np.save(folder / "samples.npy", samples)
        np.save(folder / "real.npy", evaluator.real_samples())
        np.save(folder / "reference.npy", reference.numpy())
        write_png(folder / "grid.png", image_grid(samples, columns=4, scale=4))

    machine.finish(lambda: write_folder(config.run / "teacher", fill))
    log.images(samples, step_counts[0])
    Checkpoints(config.run, "teacher", machine.world).clear()


def open_evaluator(config: RunConfig, machine: Machine, source: ImageSource) -> Evaluator:
    """The run's evaluator; it stops between steps where the run was asked to."""
    machine.watchdog.begin()

    def between() -> None:
        if machine.asked_to_stop("the evaluation"):
            raise Interrupted(f"stopped; {HINT}")  # what is not in a checkpoint is made again

    return Evaluator(
        config.evaluation,
        source,
        config.schedule.build(),
        seed=config.seed,
        num_classes=config.network.num_classes,
        world=machine.world,
        between=between,
    )


def open_data(config: RunConfig, device: torch.device) -> ImageSource:
    """The run's images on the device. UsageError where they do not fit the network."""
    network = config.network
    return load_source(
        config.data,
        image_size=network.image_size,
        channels=network.image_channels,
        device=device,
        num_classes=network.num_classes,
        loader=config.loader,
        max_bad=config.max_bad,
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


def main() -> None:
    config, extra = train_arguments()
    check_place(config.run)
    check_job(config)
    if extra.dry_run:
        check_plan(config)
        print_training_plan(config, open_device(config.device))
        return
    with open_machine(config) as machine:
        source = open_data(config, machine.world.device)
        check_evaluation(config.evaluation, source)
        with open_run(config, source, machine.world), RunLog(config.run, machine.world) as log:
            if (config.run / "teacher").exists():
                log.say(f"already finished: {config.run / 'teacher'}")
                return
            say_what_begins(config, machine, source, log)
            interrupt.install()
            network, training = train_teacher(config, new_network(config), config.train, machine, source, log)
            evaluator = open_evaluator(config, machine, source)
            write_teacher(config, machine, network, training, evaluator, config.evaluation_steps, log)
            teacher = config.run / "teacher"
            log.count_bad_images()
            flags = ["--preset", config.preset, "--data", config.data, "--teacher", str(teacher)]
            flags += ["--evaluation.features", config.evaluation.features]
            flags += ["--evaluation.num-samples", str(config.evaluation.num_samples)]
            log.say(f"wrote {teacher}; distill it with: python -m pdfast.distill {' '.join(map(shell_word, flags))}")


if __name__ == "__main__":
    run_command(main)
