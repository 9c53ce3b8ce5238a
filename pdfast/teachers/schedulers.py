"""The noise schedules of diffusers' schedulers, by an allow-list of classes: those that the classes themselves compute."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pdfast.config import ScheduleConfig, fields_of
from pdfast.diffusion import Prediction
from pdfast.diffusion.schedules import AlphaBars
from pdfast.errors import UsageError
from pdfast.reading import shown
from pdfast.teachers.sigmas import check_sigmas, sigma_schedule

INSTALL = "pip install 'pdfast[diffusers]'"
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
WHY_NOT = {
    "FlowMatch": "flow matching, which is not read yet",
    "LCM": "a student that was distilled already, which is no teacher",
    "TCD": "a student that was distilled already, which is no teacher",
}
"""What schedulers are for that are not read, by how the names of their classes begin."""
MOST_TIMES = 1 << 20


def library() -> Any:
    """Import diffusers. UsageError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"models of diffusers need diffusers ({error}): {INSTALL}") from None
    return diffusers


@dataclass(frozen=True)
class _OfTheTable:
    """The arguments that the table of a scheduler of discrete times is computed from."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...]
    rescale_betas_zero_snr: bool


@dataclass(frozen=True)
class _OfEDM:
    sigma_min: float
    sigma_max: float
    sigma_data: float
    prediction_type: Literal["epsilon", "v_prediction"]


def _arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the class: a configuration may be that of another, from which it was made."""
    return inspect.signature(getattr(library(), name).__init__).parameters


def _with_reason(name: Any) -> str:
    """Return the name of a class that is not read, for people, with the reason where it has one of its own."""
    reasons = [reason for start, reason in WHY_NOT.items() if isinstance(name, str) and name.startswith(start)]
    return f"{shown(name)} ({reasons[0]})" if reasons else shown(name)


def check_written_for(scheduler: Mapping[str, Any], name: Any, where: str) -> None:
    """Raise a UsageError where a configuration, in its `_class_name`, is that of a scheduler of another kind than the class
    `name`, for which it is to be read: diffusers would leave out what that does not take."""
    own = scheduler.get("_class_name")
    if own is not None and not any(own in kind and name in kind for kind in (DISCRETE, EDM)):
        raise UsageError(
            f"{where} is a {shown(name)}, its scheduler_config.json is of {_with_reason(own)}: give the scheduler that the network "
            "was trained with"
        )


def _kept(cls: type, scheduler: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return those of the fields of `cls` that the scheduler's class takes, as plain data. UsageError for one of a wrong type."""
    taken = _arguments(scheduler["_class_name"])
    given = [name for name in cls.__annotations__ if name in taken and name in scheduler]
    names = [name for name in given if scheduler[name] is not None]
    for name in given:
        if scheduler[name] is None and taken[name].default is not None:
            raise UsageError(
                f"{where} has no {name}, but null: give its value, or leave it out for {shown(taken[name].default)}"
            )
    kept = fields_of(cls, dict(scheduler), names, where)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def alpha_bars(scheduler: Mapping[str, Any], where: str = "the scheduler of this schedule") -> Tensor:
    """Return the table of a scheduler's configuration, which diffusers computes: float64 [T]. UsageError for a class that is not
    read, and for settings that make no table."""
    name = scheduler.get("_class_name")
    if name not in DISCRETE:
        raise UsageError(f"{where} is a {_with_reason(name)}: choose one of {', '.join(DISCRETE)}")
    given = _kept(_OfTheTable, scheduler, where)
    times = max(given.get("num_train_timesteps", 1), len(given.get("trained_betas", ())))
    if not 1 <= min(times, given.get("num_train_timesteps", 1)) <= times <= MOST_TIMES:
        raise UsageError(f"{where} has no schedule that can be read: it must have 1 to {MOST_TIMES} times")
    try:
        table = getattr(library(), str(name))(**given).alphas_cumprod.double()
        if given.get("rescale_betas_zero_snr") and len(table) > 1 and table[-1] >= table[-2]:
            table[-1] = 0  # for which some classes put 2^-24, so that their solvers do not divide by it
        AlphaBars(table)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError, ArithmeticError) as error:
        raise UsageError(f"{where} has no schedule that can be read: {error}") from None
    return table


def read_scheduler(scheduler: Mapping[str, Any], where: str) -> tuple[ScheduleConfig, dict[str, Any], Prediction]:
    """Read a scheduler's configuration, whose `_class_name` is the class that it is for: the schedule; the settings that the
    network needs; and what the adapted network predicts. UsageError for what is not read."""
    name = scheduler.get("_class_name")
    if name in EDM:
        kept = read_edm_scheduler(scheduler, where)
        return sigma_schedule(kept["sigma_min"], kept["sigma_max"]), kept, "v"
    if name not in DISCRETE:
        raise UsageError(f"{where} is a {_with_reason(name)}: choose one of {', '.join((*DISCRETE, *EDM))}")
    said = scheduler.get("prediction_type", "epsilon")
    if not isinstance(said, str) or said not in PREDICTIONS:
        raise UsageError(f"{where} has prediction_type {shown(said)}: need one of {', '.join(PREDICTIONS)}")
    if scheduler.get("use_flow_sigmas") and "use_flow_sigmas" in _arguments(name):
        raise UsageError(f"{where} has use_flow_sigmas: only variance-preserving schedules are read")
    alpha_bars(scheduler, where)
    kept = {"_class_name": name} | _kept(_OfTheTable, scheduler, where)
    return ScheduleConfig(name="diffusers", diffusers=kept), kept, PREDICTIONS[said]


def read_edm_scheduler(scheduler: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of a scheduler of EDM that the network needs. UsageError where they make no sense."""
    name = scheduler["_class_name"]
    own = {key: parameter.default for key, parameter in _arguments(name).items()}  # for what is not said
    given = {key: scheduler.get(key, own[key]) for key in _OfEDM.__annotations__}
    kept = fields_of(_OfEDM, given, given, where)
    try:
        check_sigmas(kept["sigma_min"], kept["sigma_max"], kept["sigma_data"])
    except ValueError as error:
        raise UsageError(f"{where} has no schedule that can be read: {error}") from None
    return {"_class_name": name} | kept
