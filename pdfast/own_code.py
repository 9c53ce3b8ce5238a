"""A teacher made by a function of the user's own: code that runs only because the command line names it, each time.

`--teacher package.module:function`, or `--network-from` where a folder has the weights, gives the name; folders and
configurations record it and run nothing.
"""

import re
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdfast.diffusion import PREDICTIONS, Prediction, Schedule
from pdfast.diffusion.schedules import check_schedule
from pdfast.io.errors import UsageError
from pdfast.io.reading import shown

FLAG = "--network-from"
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
TIMES = 8  # a schedule is known again by its angles at u = 0, 1/8, ..., 1
SAME_ANGLE = 2e-6
_HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Teacher:
    """What such a function returns."""

    network: nn.Module
    """`network(z, phi, cond) -> output`: z float32 [N, C, H, W], phi float32 [N] in radians, cond int64 [N] of classes or None, to
    [N, C, H, W], or [N, 2C, H, W] for x and eps together; with its weights."""
    prediction: Prediction
    """What it predicts: x, eps, v, both or flow."""
    schedule: Schedule
    """How noise grows: one of pdfast, such as pdfast.Flow(), or another object with `phi(u)` and `delta(u, du)`."""
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    num_classes: int = 0
    """Classes for conditioning; 0 for an unconditional model."""
    null_label: int | None = None
    """The label by which it is told no class, num_classes in many models; None where it knows none, and cannot be guided."""


@dataclass(frozen=True, eq=False)
class OwnCode:
    """The function that the command line named, and what it returned."""

    name: str
    teacher: Teacher


_allowed: OwnCode | None = None


def is_function(place: object) -> bool:
    """Tell whether it is the name of a function, package.module:function, and nothing on the disk."""
    return NAME.fullmatch(str(place)) is not None and not Path(str(place)).exists()


def allow(name: str | None) -> None:
    """Run the function that the command line names, None for none, for the rest of this command. UsageError, in one line, where it
    does not exist, fails, or returns something else than a Teacher."""
    global _allowed
    _allowed = None
    if name is None:
        return
    if not is_function(name):
        raise UsageError(f"{FLAG} {name}: name a function, as package.module:function")
    _allowed = OwnCode(name, _checked(name, _called(name)))


def given(name: str, what: str) -> OwnCode:
    """Return the function that the command line named, for what was made by one called `name`. UsageError where none was
    named."""
    if _allowed is None:
        name = name if NAME.fullmatch(name) else shown(name)
        raise UsageError(f"{what} is made by {name}, code of your own, which no folder runs: say {FLAG} {name}")
    return _allowed


def _called(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise located(name, error) from None
        raise UsageError(
            f"{name}: there is no module {error.name}: start from the folder that holds it, or name that in PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise located(name, error) from None
    made = getattr(found, function, None)
    if not callable(made):
        others = [key for key, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
        raise UsageError(f"{name}: {found.__file__} has no function {function}, but {', '.join(others) or 'none'}")
    try:
        return made()
    except (Exception, SystemExit) as error:
        raise located(name, error) from None


def located(name: str, error: BaseException) -> UsageError:
    """Return what failed in code of the user's own, in one line: the error, where it arose in the function's file, and where
    it was raised if that was elsewhere."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_HERE, "<frozen"))]
    own = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    places = [f"{f.filename}, line {f.lineno}, in {f.name}" for f in frames]
    chosen = [place for frame, place in zip(frames, places, strict=True) if frame.filename == own][-1:] + places[-1:]
    if isinstance(error, SyntaxError):
        chosen = [f"{error.filename}, line {error.lineno}"]
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    message = " ".join(said.split())[:300]
    where = "; raised in ".join(dict.fromkeys(chosen))
    return UsageError(f"{name} failed: {type(error).__name__}: {message} ({where})")


def _checked(name: str, made: Any) -> Teacher:
    if not isinstance(made, Teacher):
        raise UsageError(
            f"{name} returned a {type(made).__name__}: let it return pdfast.Teacher(network, prediction, schedule, image_shape)"
        )
    if not isinstance(made.network, nn.Module):
        raise UsageError(f"{name}: its network is a {type(made.network).__name__}: let it be a torch.nn.Module")
    if made.prediction not in PREDICTIONS:
        raise UsageError(f"{name}: its prediction is {shown(made.prediction)}: choose from {', '.join(PREDICTIONS)}")
    shape = made.image_shape
    if not (isinstance(shape, tuple | list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise UsageError(f"{name}: its image_shape is {shown(shape)}: need (C, H, W)")
    if type(made.num_classes) is not int or made.num_classes < 0:
        raise UsageError(f"{name}: its num_classes is {shown(made.num_classes)}: need a number of classes, 0 for none")
    null = made.null_label
    if null is not None and (type(null) is not int or null < 0 or not made.num_classes):
        raise UsageError(
            f"{name}: its null_label is {shown(null)}: need a label of a network that has classes, or None"
        )
    try:
        check_schedule(made.schedule, "phi", "delta")
    except TypeError as error:
        raise UsageError(f"{name} returned no schedule: {error}") from None
    angles_of(name, made.schedule)
    return made


def angles_of(name: str, schedule: Schedule) -> tuple[float, ...]:
    """Return the angles that a schedule is known again by. UsageError where it fails."""
    u = torch.linspace(0, 1, TIMES + 1, dtype=torch.float64)
    try:
        phi, delta = schedule.phi(u), schedule.delta(u[1:], u[1:] - u[:-1])
        fits = bool(torch.allclose(phi.diff(), delta, atol=1e-6, rtol=0))
        angles = tuple(round(angle, 6) for angle in phi.tolist())
    except Exception as error:
        raise located(name, error) from None
    if len(angles) != TIMES + 1 or not fits:
        raise UsageError(
            f"{name}: its schedule's delta(u, du) is not phi(u) - phi(u - du), of the shape of u: correct it"
        )
    return angles


def schedule(name: str, angles: tuple[float, ...]) -> Schedule:
    """Return the schedule of the function that the command line named, for what was made with one of those angles.
    UsageError where it is another."""
    own = given(name, "the noise schedule")
    now = angles_of(own.name, own.teacher.schedule)
    if len(now) != len(angles) or any(abs(a - b) > SAME_ANGLE for a, b in zip(now, angles, strict=True)):
        raise UsageError(f"the schedule of {own.name} is another than this was made with: let it return that one")
    return own.teacher.schedule
