"""Tables of alpha-bars that diffusers' schedulers compute, by an allow-list of classes."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdfast.diffusion import AlphaBars
from pdfast.io.errors import UsageError
from pdfast.io.plain import fields_of
from pdfast.io.reading import shown

INSTALL = "pip install 'pdfast[diffusers]'"
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
class OfTheTable:
    """The arguments that the table of a scheduler of discrete times is computed from."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...]
    rescale_betas_zero_snr: bool


def arguments_of(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the class: a configuration may be that of another, from which it was made."""
    return inspect.signature(getattr(library(), name).__init__).parameters


def with_reason(name: Any) -> str:
    """Return the name of a class that is not read, for people, with the reason where it has one of its own."""
    reasons = [reason for start, reason in WHY_NOT.items() if isinstance(name, str) and name.startswith(start)]
    return f"{shown(name)} ({reasons[0]})" if reasons else shown(name)


def settings_of(cls: type, scheduler: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return those of the fields of `cls` that the scheduler's class takes, as plain data. UsageError for one of a wrong type."""
    taken = arguments_of(scheduler["_class_name"])
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
        raise UsageError(f"{where} is a {with_reason(name)}: choose one of {', '.join(DISCRETE)}")
    given = settings_of(OfTheTable, scheduler, where)
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
