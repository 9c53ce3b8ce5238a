"""What is wrong with a run and can be known before it begins: each check raises a UsageError, in one line."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pdfast.config import DistillConfig, EvaluationConfig, RunConfig, TrainConfig
from pdfast.data import DIGITS_SHAPE, ImageSource, check_shape, codec_of
from pdfast.diffusion import check_start
from pdfast.engine.cost import parameters_and_flops
from pdfast.engine.optimizer import check_backend
from pdfast.evaluation import mobilenet
from pdfast.evaluation.features import check_feature_space
from pdfast.evaluation.metrics import split_real
from pdfast.evaluation.trained import check_labels
from pdfast.io.bounds import MOST_PARAMETERS, SETTINGS, require
from pdfast.io.errors import UsageError
from pdfast.methods import method_of_round
from pdfast.networks import NetworkConfig
from pdfast.networks.guided import in_range
from pdfast.rounds import parse_learning_rates, parse_updates

GRID = 1024  # of diffusion times, at which a schedule is looked at


def _plain_values(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers and texts of a configuration, each with its place."""
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), place + field.name
        if isinstance(value, NetworkConfig) or here in ("schedule.table", "schedule.angles"):
            continue  # which check themselves
        if dataclasses.is_dataclass(value):
            yield from _plain_values(value, f"{here}.")
        else:
            yield from ((here, v) for v in (value if isinstance(value, tuple) else [value]))


def check_once(flag: str, counts: Sequence[int | str]) -> None:
    """Raise a UsageError where a flag names a step count twice."""
    twice = [n for n, times in Counter(map(int, counts)).items() if times > 1]
    if twice:
        raise UsageError(f"--{flag} names {twice[0]} steps twice: leave one")


def check_values(config: DistillConfig | TrainConfig) -> None:
    """Raise a UsageError for values that no run can have."""
    for place, value in _plain_values(config):
        flag = place.replace("_", "-")
        if isinstance(value, int | float) and not isinstance(value, bool):
            require(flag, value, SETTINGS[place])
        elif isinstance(value, str | Path) and "\0" in str(value):
            raise UsageError(f"--{flag} has a character in it that no name has: {str(value)!r}")
    if isinstance(config, TrainConfig):
        if not config.evaluation_steps:
            raise UsageError("--evaluation-steps needs at least one step count")
        if not config.folder.is_begun():
            check_once("evaluation-steps", config.evaluation_steps)
        return
    default, exceptions = parse_updates(config.updates)
    if not config.folder.is_begun():
        for name in ("updates", "method", "learning_rate_at"):
            check_once(name.replace("_", "-"), re.findall(r"(\d+):", getattr(config, name)))
    for rate in parse_learning_rates(config.learning_rate_at).values():
        require("learning-rate-at", rate, SETTINGS["learning_rate"])
    for updates in (default, *exceptions.values()):
        if updates > SETTINGS["train.updates"].high:
            raise UsageError(f"--updates must be at most {SETTINGS['train.updates'].high}, got {updates}")
    _check_methods(config)
    if config.convert and config.teacher is None:
        raise UsageError(
            "--convert is for a teacher that is given: say --teacher, or train one with --network.prediction v"
        )


def _check_methods(config: DistillConfig) -> None:
    """Raise a UsageError for settings of the rounds' methods that do not fit the plan."""
    methods = {steps: config.method_at(steps) for steps in config.round_steps}
    by_tract = [steps for steps, method in methods.items() if method == "tract"]
    if config.kept.reuse > 1 and by_tract:
        raise UsageError(
            f"--kept.reuse {config.kept.reuse}: targets of tract are the student's own and move with it, so that none serves twice; leave "
            "it out, or choose another --method"
        )
    if config.tract.grids and by_tract:
        if by_tract != config.round_steps[:1]:
            raise UsageError(
                "--tract.grids is for the first round alone, whose teacher takes any number of steps: let --method name tract for "
                f"{config.round_steps[0]} steps only"
            )
        for grid in config.tract.grids:
            if grid % by_tract[0]:
                raise UsageError(
                    f"--tract.grids {grid} is not a multiple of the student's steps, {by_tract[0]}: correct it"
                )
    for steps in [steps for steps, method in methods.items() if method == "pairs"]:
        origin = config.pairs_at(steps)
        if origin.steps % origin.finest:
            raise UsageError(
                f"--kept.pair-steps {origin.steps}: pairs for the student of {origin.finest} steps are drawn in a multiple of its steps: "
                f"correct it"
            )


def check_guidance(config: DistillConfig) -> None:
    """Raise a UsageError where the teacher cannot be guided as the configuration says."""
    if config.guidance_range is None:
        return
    network, teacher, guidance = config.network, config.teacher, config.guidance
    if network.guidance is not None:
        raise UsageError(
            f"--guidance {guidance}: {teacher} has guidance of {in_range(network.guidance)} inside, and would be guided twice: leave it out"
        )
    if network.null_label is None and teacher is None:
        raise UsageError(
            f"--guidance {guidance} is for a teacher that is trained without its class at times: say --train.label-dropout 0.1, with "
            "--network.num-classes"
        )
    if network.null_label is None:
        raise UsageError(
            f"--guidance {guidance}: {teacher} was never trained without its class, and cannot be guided: leave it out"
        )
    try:
        network.guided(config.guidance_range)
    except ValueError as error:
        raise UsageError(f"--guidance {guidance}: {error}") from None


def check_job(config: RunConfig) -> None:
    """Raise a UsageError for a network that does not run, a schedule or steps without finite angles and weights, a prediction
    that says nothing where sampling starts, or an optimizer that is not installed."""
    _check_network(config)
    _check_schedule(config)
    check_backend(config.engine.optimizer)


def _check_network(config: RunConfig) -> None:
    network = config.network
    if isinstance(network, NetworkConfig):
        sizes = [network.image_size >> level for level in range(len(network.channel_mult))]
        missing = [size for size in network.attention_resolutions if size not in sizes]
        if missing and not config.folder.is_begun():  # where it goes on, without the attention that it never had
            raise UsageError(
                f"--network.attention-resolutions {missing[0]}: the network has no level of that size, but of "
                f"{', '.join(map(str, sizes))}; correct it, or leave it out"
            )
    try:
        parameters = parameters_and_flops(network)[0]
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the network does not run as it is configured ({reason}): correct --network") from None
    if parameters > MOST_PARAMETERS:
        raise UsageError(
            f"the network has {parameters:,} parameters, more than {MOST_PARAMETERS:,}: make it smaller with --network"
        )


def _check_schedule(config: RunConfig) -> None:
    schedule = config.schedule.build()
    phi = schedule.phi(torch.linspace(0, 1, GRID + 1, dtype=torch.float64))
    if not bool((phi.diff() > 0).all()) or not 0 <= float(phi[0]) < float(phi[-1]) <= 1.5707963267948968:
        raise UsageError(
            f"schedule: the angles of {config.schedule.name} do not rise from the image to the noise: correct --schedule"
        )
    try:
        check_start(config.network.prediction, float(phi[-1]))
    except ValueError as error:
        raise UsageError(
            f"{error}; as flags: --schedule.u-start 0.95, or --convert v for a copy of a teacher"
        ) from None
    if not isinstance(config, DistillConfig):
        return
    for steps in config.round_steps:
        try:
            table = method_of_round(config, steps).step_table(config, steps)
        except ValueError as error:
            raise UsageError(f"the round to {steps} steps: {error}") from None
        if not all(bool(torch.isfinite(column).all()) for column in table.columns()):
            raise UsageError(
                f"the round to {steps} steps has targets or weights that are not finite: take fewer steps, or correct "
                "--schedule or --weighting"
            )


def check_plan(config: RunConfig) -> None:
    """Raise a UsageError where the built-in data are not of the network's shape, there are no such features, or they take no
    images of that shape. Of features whose package is not installed it is said: the run may be for another machine."""
    network, features = config.network, config.evaluation.features
    shape = codec_of(network).data_shape(network.image_shape)
    if config.data == "digits":
        check_shape(config.data, DIGITS_SHAPE, shape)
    check_feature_space(features, shape, weights=False)
    if features == "mobilenet" and not mobilenet.installed():
        print(f"The run needs the weights of mobilenet, which are not installed here: {mobilenet.INSTALL}")


def check_evaluation(evaluation: EvaluationConfig, source: ImageSource) -> None:
    """Raise a UsageError, before anything is trained, drawn or written, where these images cannot be evaluated as configured."""
    split_real(source.num_images, evaluation.num_samples, seed=0, reference=evaluation.reference)
    check_feature_space(evaluation.features, source.shape)
    if evaluation.features == "classifier":
        check_labels(source)
