"""Progressive Distillation (Salimans & Ho 2022, Algorithm 2): halve a diffusion model's sampling steps, round by round.

    torchrun --standalone -m pdfast.distill --rounds 8

Without --teacher the preset's teacher is trained first. The same command run again resumes. The run's folder ends with
students/NNNN for every step count and report.html.
"""

import dataclasses
from typing import cast

import torch
from torch import Tensor

from pdfast.arguments import distill_arguments
from pdfast.checks import check_evaluation, check_guidance, check_job, check_plan
from pdfast.cli import run_command
from pdfast.config import DistillConfig
from pdfast.data import ImageSource
from pdfast.engine.device import open_device
from pdfast.engine.log import RunLog
from pdfast.engine.loop import Stage, Trainer
from pdfast.engine.machine import Machine, open_machine
from pdfast.engine.run import open_run
from pdfast.evaluation.evaluator import Evaluator
from pdfast.evaluation.stored import read_reference
from pdfast.io import interrupt
from pdfast.io.errors import UsageError
from pdfast.io.reading import read_json
from pdfast.io.text import clock
from pdfast.methods import Distillation, MethodOfRound, Networks, method_of_round
from pdfast.networks import NetworkConfig
from pdfast.networks.converted import ConvertedConfig
from pdfast.networks.guided import Guided, GuidedConfig, in_range, start_of
from pdfast.plan.budget import seconds_of_forward, with_updates
from pdfast.plan.dry_run import print_distillation_plan
from pdfast.pretrained.model_folder import SavedModel, load_model
from pdfast.recipes import preset
from pdfast.report.html import build_report
from pdfast.stages import (
    check_finished,
    convert_teacher,
    open_data,
    open_evaluator,
    say_what_begins,
    total_seconds,
    train_teacher,
    write_student,
    write_teacher,
)


def with_teachers_network(config: DistillConfig) -> tuple[DistillConfig, SavedModel | None]:
    """Return the configuration with the network and schedule of --teacher, and that teacher, on the CPU (None where none was
    given)."""
    if config.teacher is None:
        check_guidance(config)
        return config, None
    saved = load_model(config.teacher, torch.device("cpu"))
    if isinstance(saved.network, Guided):
        config = _with_guidance_of(saved.network.config, config)
        saved = dataclasses.replace(saved, network=saved.network.inner)
    if saved.steps is not None and saved.steps != config.start_steps:
        raise UsageError(
            f"{config.teacher} is a student of {saved.steps} steps: distill it from there, with --start-steps {saved.steps}"
        )
    if saved.steps is not None and config.kept.pair_steps is not None:  # it knows its own steps alone
        if config.kept.pair_steps != preset(config.preset).kept.pair_steps:
            raise UsageError(
                f"--kept.pair-steps {config.kept.pair_steps}: {config.teacher} is a student, which knows its own {saved.steps} steps alone; "
                "leave it out, so that it draws the pairs in those"
            )
        config = dataclasses.replace(config, kept=dataclasses.replace(config.kept, pair_steps=None))
    try:
        network = ConvertedConfig(saved.config) if config.convert else saved.config
    except ValueError as error:
        raise UsageError(f"--convert {config.convert}, {config.teacher}: {error}") from None
    schedule = saved.schedule
    if config.schedule.u_start != 1:
        schedule = dataclasses.replace(schedule, u_start=config.schedule.u_start)
    # --network has flags for our U-Net; the configurations of other networks have what is read of one besides.
    config = dataclasses.replace(config, network=cast(NetworkConfig, network), schedule=schedule)
    check_guidance(config)
    return config, saved


def _with_guidance_of(teacher: GuidedConfig, config: DistillConfig) -> DistillConfig:
    """Return the configuration with the guidance that the given teacher was written with. UsageError where another was said."""
    if config.guidance_range not in (None, teacher.guidance):
        raise UsageError(
            f"--guidance {config.guidance}: {config.teacher} is guided by {in_range(teacher.guidance)} already; leave it out, or give the "
            "teacher that it was made from"
        )
    return dataclasses.replace(config, guidance="..".join(f"{g:g}" for g in teacher.guidance))


def make_teacher(
    config: DistillConfig, machine: Machine, given_teacher: SavedModel | None, source: ImageSource, log: RunLog
) -> Evaluator:
    """Write runs/NAME/teacher: train it, convert the given one, or take that as it is. Return the run's evaluator."""
    training = conversion = None
    if given_teacher is None:
        teacher, training = train_teacher(config, machine, source, log)
        evaluator = open_evaluator(config, machine, source)
    elif config.convert:
        evaluator = open_evaluator(config, machine, source)
        teacher, training, conversion = convert_teacher(config, given_teacher, machine, source, evaluator, log)
    else:
        teacher = machine.prepare_student(given_teacher.network)
        evaluator = open_evaluator(config, machine, source)
    if isinstance(config.teacher_network, GuidedConfig):
        teacher = Guided(config.teacher_network, teacher)
    step_counts = [config.first_steps, *(n for n in config.round_steps if n <= config.evaluation.max_steps)]
    write_teacher(config, machine, teacher, training, evaluator, step_counts, log, conversion)
    machine.write_with_retry(lambda: build_report(config.run))
    return evaluator


def distill(
    config: DistillConfig,
    method_of: MethodOfRound,
    machine: Machine,
    given_teacher: SavedModel | None,
    source: ImageSource,
    log: RunLog,
) -> None:
    """Run all stages: the teacher, then round after round, each skipped where its folder is already there."""
    world = machine.world
    teacher_folder = config.folder.teacher
    shape = (config.evaluation.num_samples, *config.network.image_shape)
    world.run_on_rank0(lambda: check_finished(config, shape))
    evaluator: Evaluator | None = None
    if not world.run_on_rank0(teacher_folder.exists):
        evaluator = make_teacher(config, machine, given_teacher, source, log)

    def weights(steps: int) -> dict[str, Tensor]:
        network = load_model(config.model_folder(steps), torch.device("cpu")).network
        inside = network.inner if isinstance(network, Guided) else network
        return start_of(config.student_network, inside.state_dict())

    networks: Networks | None = None
    method: Distillation | None = None
    trainer: Trainer | None = None
    for round_index, steps in enumerate(config.round_steps, start=1):
        if world.run_on_rank0(config.folder.student(steps).exists):
            continue
        networks = networks or Networks.prepare(config, machine)
        kind, table = method_of(config, steps), method_of(config, steps).step_table(config, steps)
        if method is None or type(method) is not kind or not method.serves(steps, table):
            trainer = method = None  # with what they hold of the device's memory
            method = kind.open(config, machine, networks, table)
            trainer = Trainer(method, kind.optimization(config), config, machine, source, log)
        assert trainer is not None
        method.start_from(steps, table, weights, trainer.batch)
        models = [config.model_folder(n) for n in dict.fromkeys(kind.models(config, steps))]
        hashes = "+".join(read_json(folder / "config.json")["sha256"] for folder in models)
        stage = Stage(config.updates_at(steps), steps, round_index, hashes, config.learning_rate_to(steps))
        training = trainer.train(stage)
        if evaluator is None:
            evaluator = open_evaluator(config, machine, source)
            evaluator.set_reference(torch.from_numpy(read_reference(teacher_folder, shape)))
        write_student(trainer, training, evaluator, stage, models[0])
        if steps != config.end_steps:
            machine.write_with_retry(lambda: build_report(config.run))

    machine.write_with_retry(lambda: build_report(config.run))
    log.say(f"finished, {clock(total_seconds(config))} of training; open {config.folder.report}")


def main(method: type[Distillation] | None = None) -> None:
    """Run the command, with a method of distillation of your own where one is given: in all rounds, whatever --method says."""
    method_of: MethodOfRound = method_of_round if method is None else lambda config, steps: method
    config, extra = distill_arguments()
    config.folder.check()
    config, given_teacher = with_teachers_network(config)
    check_job(config)
    if extra.dry_run:
        check_plan(config)
        print_distillation_plan(config, method_of, open_device(config.device), extra.gpu)
        return
    with open_machine(config) as machine:
        config = with_updates(
            config, method_of, lambda: seconds_of_forward(config, machine), machine.world.run_on_rank0
        )
        source = open_data(config, machine.world.device)
        check_evaluation(config.evaluation, source)
        with (
            open_run(config, source, machine.world, given_teacher.weights_sha256 if given_teacher else None),
            RunLog(config.run, machine.world) as log,
        ):
            interrupt.install()
            say_what_begins(config, machine, source, log)
            if config.minutes is not None:
                teacher = "" if config.teacher else f"{config.train.updates} of the teacher, "
                pairs = f", {config.kept.count:,} pairs" if "pairs" in map(config.method_at, config.round_steps) else ""
                log.say(f"updates for {config.minutes:g} minutes: {teacher}rounds {config.updates}{pairs}")
            distill(config, method_of, machine, given_teacher, source, log)
            log.count_bad_images()


if __name__ == "__main__":
    run_command(main)
