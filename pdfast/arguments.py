"""From a command line to a resolved configuration: preset or saved file, then flags, then what follows from them."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pdfast import own_code
from pdfast.checks import check_values
from pdfast.cli import parse
from pdfast.config import (
    SAVED_FACTS,
    DistillConfig,
    TrainConfig,
)
from pdfast.flags import FlagCreatePairsOff, OptionalPath, OptionalString, arg
from pdfast.io.errors import UsageError
from pdfast.io.plain import structure, unstructure
from pdfast.io.reading import load_yaml
from pdfast.plan.gpu import GpuName
from pdfast.recipes import preset
from pdfast.rounds import fields_of_plan, parse_learning_rates, parse_methods, parse_updates, resolve_steps

C = TypeVar("C", DistillConfig, TrainConfig)


@dataclasses.dataclass(frozen=True)
class Extra:
    """What steers the command and is not part of a run."""

    config: OptionalPath = None
    """A saved config.yaml to start from instead of the preset; flags override it."""
    dry_run: Annotated[bool, FlagCreatePairsOff] = False
    """Print the plan (rounds, updates, network evaluations, memory, time) and stop. What a run would refuse is refused, but
    for what is wrong with the data, which are not read, and for weights of features that are not installed."""
    gpu: Annotated[GpuName | None, arg(metavar="{h200,h100,b200,a100}")] = None
    """With --dry-run: plan with the time that is predicted for such a GPU, in place of this machine's, which is measured."""


def _peek(flag: str, arguments: list[str]) -> str | None:
    """Return the value of one flag, before the whole line is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(arguments)[0].value


def _defaults(cls: type[C], arguments: list[str]) -> C:
    """Return the preset, or the saved configuration, that flags override. Fields of the other command are passed over."""
    file, name = _peek("--config", arguments), _peek("--preset", arguments)
    plain = load_yaml(Path(file)) if file else {}
    if isinstance(plain.get("network"), dict) and "kind" in plain["network"]:  # it comes with the teacher
        del plain["network"]
    base = unstructure(preset(name or plain.get("preset", "digits"))) | plain
    known, other = _names(cls), _names(DistillConfig) | _names(TrainConfig) | SAVED_FACTS
    return structure(cls, {k: v for k, v in base.items() if k in known or k not in other}, file or f"preset {name}")


def _extra(parsed: Extra) -> Extra:
    """Return what is no part of the run. UsageError for --gpu without --dry-run."""
    if parsed.gpu and not parsed.dry_run:
        raise UsageError(f"--gpu {parsed.gpu} is for --dry-run: add that, or leave --gpu out")
    return Extra(parsed.config, parsed.dry_run, parsed.gpu)


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def distill_arguments() -> tuple[DistillConfig, Extra]:
    """Return the command line of `pdfast.distill`, resolved: rounds, start_steps and end_steps are all set, and plan where the
    rounds are not all by one factor."""

    @dataclasses.dataclass(frozen=True)
    class Arguments(Extra, DistillConfig):
        network_from: OptionalString = None
        """package.module:function, where --teacher is a folder whose network is made by code of your own."""

    base = _defaults(DistillConfig, sys.argv[1:])
    unset = dataclasses.replace(base, plan=None, rounds=None, start_steps=None, end_steps=None)
    parsed = parse(
        Arguments,
        default=Arguments(**_fields(unset)),
        prog="python -m pdfast.distill",
        description="Distill a diffusion model to few steps (Salimans & Ho 2022). Without --teacher the preset's teacher is "
        "trained first. The same command run again resumes.",
    )
    fields = {name: getattr(parsed, name) for name in _names(DistillConfig)}
    if _peek("--learning-rate", sys.argv[1:]) is not None and _peek("--learning-rate-at", sys.argv[1:]) is None:
        fields["learning_rate_at"] = ""
    config = DistillConfig(**fields | _resolve_plan(parsed, base))
    if config.teacher is None:
        config = _of_teacher(config)
    _refuse_empty(sys.argv[1:])
    check_values(config)
    if config.minutes is not None:
        divided = ["--updates", "--train.updates"]
        if "pairs" in map(config.method_at, config.round_steps):
            divided.append("--kept.count")
        if said := [flag for flag in divided if _peek(flag, sys.argv[1:])]:
            raise UsageError(
                f"--minutes {config.minutes:g} and {said[0]}: the minutes are divided into updates and pairs, leave one of them out"
            )
    own_code.allow(_own_code(config.teacher, parsed.network_from))
    if config.teacher is not None:
        _refuse_what_the_teacher_brings(config, sys.argv[1:])
    tables: dict[str, Callable[[str], Any]] = {
        "updates": lambda text: parse_updates(text)[1],
        "method": lambda text: parse_methods(text)[1],
        "learning_rate_at": parse_learning_rates,
    }
    for name, steps_in in tables.items():
        table = getattr(config, name)
        if table == getattr(base, name):
            continue  # a preset's serves any number of rounds
        for steps in steps_in(table):
            if steps not in config.round_steps:
                raise UsageError(
                    f"--{name.replace('_', '-')} {table} names a round to {steps} steps, but the rounds lead to "
                    f"{', '.join(map(str, config.round_steps))}: correct the table"
                )
    return config, _extra(parsed)


def _of_teacher(config: C) -> C:
    """Return a configuration of a teacher that is trained, with its schedule's table and the label for no class. UsageError where it
    knows no classes, and is to forget them."""
    schedule, network = config.schedule.with_table(), config.network
    if config.train.label_dropout:
        if not network.num_classes:
            raise UsageError(
                f"--train.label-dropout {config.train.label_dropout:g} is for a network that is told classes: say --network.num-classes, or "
                "leave it out"
            )
        network = dataclasses.replace(network, null_label=network.num_classes)
    return dataclasses.replace(config, schedule=schedule, network=network)


def _resolve_plan(parsed: DistillConfig, base: DistillConfig) -> dict[str, Any]:
    """Return the fields that say through which step counts the rounds lead: as the user said, or, where nothing was said, as the
    preset does. UsageError where they contradict each other."""
    said = parsed.rounds, parsed.start_steps, parsed.end_steps
    flags = [flag for flag in ("--rounds", "--start-steps", "--end-steps", "--factor") if _peek(flag, sys.argv[1:])]
    if parsed.plan is not None and flags:
        raise UsageError(f"--plan {parsed.plan} and {flags[0]}: the plan says all of it, leave {flags[0]} out")
    plan = parsed.plan if parsed.plan is not None or flags else base.plan
    if plan is not None:
        return fields_of_plan(plan)
    rounds, start, end = resolve_steps(said, (base.rounds, base.start_steps, base.end_steps), parsed.factor)
    return {"rounds": rounds, "start_steps": start, "end_steps": end}


def _own_code(teacher: Path | None, network_from: str | None) -> str | None:
    """Return the function that the command line lets run. UsageError where it is named by a saved configuration alone, or
    twice."""
    if not own_code.is_function(teacher):
        return network_from
    if _peek("--teacher", sys.argv[1:]) is None:
        raise UsageError(
            f"the teacher is made by {teacher}, code of your own, which no file runs: say --teacher {teacher}"
        )
    if network_from is not None:
        raise UsageError(
            f"{own_code.FLAG} is for a --teacher that is a folder: leave it out, {teacher} makes the network"
        )
    return str(teacher)


def _refuse_empty(arguments: list[str]) -> None:
    """Raise a UsageError for a place that is the empty text, which would be taken for the folder that the command is in."""
    for flag in ("--run", "--run-dir", "--data", "--teacher"):
        if _peek(flag, arguments) == "":
            raise UsageError(f"{flag} is empty: name a place; a variable of the shell may not be set")


def _refuse_what_the_teacher_brings(config: DistillConfig, arguments: list[str]) -> None:
    """Raise a UsageError for flags that would do nothing beside --teacher."""
    allowed = {"--schedule.u-start", *(["--train.ema"] if config.convert else [])}
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith(("--network.", "--schedule.", "--train.")) and flag not in allowed:
            raise UsageError(
                f"{flag} is for a teacher that is trained first: leave it out, {config.teacher} brings its own network and schedule"
            )


def train_arguments() -> tuple[TrainConfig, Extra]:
    """Return the command line of `pdfast.train`."""

    @dataclasses.dataclass(frozen=True)
    class Arguments(Extra, TrainConfig):
        pass

    base = _defaults(TrainConfig, sys.argv[1:])
    if _peek("--config", sys.argv[1:]) is None:
        base = dataclasses.replace(base, run=Path(f"{base.run}-teacher"))
    parsed = parse(
        Arguments,
        default=Arguments(**_fields(base)),
        prog="python -m pdfast.train",
        description="Train a teacher (Algorithm 1 of Salimans & Ho 2022). The same command run again resumes.",
    )
    config = TrainConfig(**{name: getattr(parsed, name) for name in _names(TrainConfig)})
    config = _of_teacher(config)
    _refuse_empty(sys.argv[1:])
    check_values(config)
    return config, _extra(parsed)
