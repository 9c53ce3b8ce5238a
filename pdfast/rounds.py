"""What is said of rounds on a command line: their step counts, and tables by the student's step count."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast, get_args

from pdfast.io.bounds import MOST_GUIDANCE, MOST_STEPS, SETTINGS, require
from pdfast.io.errors import UsageError

MethodName = Literal["progressive", "tract", "pairs"]
STEP_FACTOR = 2
"""Steps of the teacher that one step of its student replaces, unless said otherwise."""

T = TypeVar("T")


def _parse_by_steps(text: str, value: str, convert: Callable[[str], T], wanted: str) -> tuple[T, dict[int, T]]:
    """Return the default and the exceptions of a table by step count. value: a regular expression."""
    if not re.fullmatch(rf"({value})(,\d+:({value}))*", text):
        raise UsageError(wanted)
    default, *exceptions = text.split(",")
    return convert(default), {int(steps): convert(v) for steps, v in (entry.split(":") for entry in exceptions)}


def parse_updates(text: str) -> tuple[int, dict[int, int]]:
    """`50000` or `50000,2:100000` -> (default, {steps: updates}). UsageError where it is neither."""
    wanted = f"updates {text!r} is not a number or a table such as 50000,2:100000,1:100000"
    return _parse_by_steps(text, r"\d+", int, wanted)


def parse_learning_rates(text: str) -> dict[int, float]:
    """`4:1e-3,1:2e-3` -> {4: 1e-3, 1: 2e-3}. UsageError where it is something else."""
    number = r"\d*\.?\d+(?:e[+-]?\d+)?"
    wanted = f"learning-rate-at {text!r} is not a table such as 4:1e-3,2:1e-3"
    return _parse_by_steps(f"0,{text}" if text else "0", number, float, wanted)[1]


def parse_methods(text: str) -> tuple[MethodName, dict[int, MethodName]]:
    """`progressive` or `progressive,1:pairs` -> (default, {steps: method}). UsageError where it is neither."""
    names = get_args(MethodName)
    wanted = f"method {text!r} is not one of {', '.join(names)}, or a table such as progressive,2:pairs,1:pairs"
    return _parse_by_steps(text, "|".join(names), lambda name: cast(MethodName, name), wanted)


def parse_guidance(text: str | None) -> tuple[float, ...] | None:
    """`1.5` -> (1.5,), `0..4` -> (0.0, 4.0), None and `1`, which is none, -> None. UsageError where it is something else."""
    if text is None:
        return None
    number = r"\d*\.?\d+"
    if not re.fullmatch(rf"{number}(\.\.{number})?", text):
        raise UsageError(f"guidance {text!r} is not a number, or a range such as 0..4")
    values = tuple(map(float, text.split("..")))
    if not values[0] <= values[-1] <= MOST_GUIDANCE or (len(values) == 2 and values[0] == values[1]):
        raise UsageError(
            f"guidance {text!r}: need a number from 0 to {MOST_GUIDANCE:g}, or a range that rises within that"
        )
    return None if values == (1.0,) else values


def parse_plan(text: str) -> list[int]:
    """`256,16,4,1` -> [256, 16, 4, 1]. UsageError unless each of at least two numbers is a divisor of the one before, and less."""
    if not re.fullmatch(r"\d+(,\d+)+", text):
        raise UsageError(f"plan {text!r} is not a list of step counts such as 256,64,16,4,1")
    counts = list(map(int, text.split(",")))
    for before, after in pairwise(counts):
        if not 1 <= after < before <= MOST_STEPS or before % after:
            raise UsageError(
                f"plan {text!r}: {after} cannot follow {before}: each step count, from {MOST_STEPS} down to 1, must be less than "
                "the one before and divide it"
            )
    return counts


def fields_of_plan(text: str) -> dict[str, Any]:
    """Return the fields of a DistillConfig that a plan fixes. UsageError for one that is none."""
    counts = parse_plan(text)
    return {"plan": text, "rounds": len(counts) - 1, "start_steps": counts[0], "end_steps": counts[-1]}


Steps = tuple[int | None, int | None, int | None]


def resolve_steps(given: Steps, preset: Steps, factor: int = STEP_FACTOR) -> tuple[int, int, int]:
    """(rounds, start_steps, end_steps) of which any two give the third and end_steps is 1 unless said.

    given: what the user said, None for the rest; where nothing was said, the preset's.
    """
    require("factor", factor, SETTINGS["factor"])
    rounds, start, end = given
    if rounds is None and start is None:
        preset_rounds, preset_start, preset_end = preset
        rounds, end = preset_rounds, end if end is not None else preset_end
        start = preset_start if end is None else None
    for name, value in (("rounds", rounds), ("start-steps", start), ("end-steps", end)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if rounds is not None and (rounds > MOST_STEPS.bit_length() or factor**rounds > MOST_STEPS):
        raise UsageError(
            f"--rounds {rounds} means more than {MOST_STEPS} steps, each round dividing by {factor}; 13 halve 8192 steps to 1"
        )
    if end is None:
        end = 1 if rounds is None or start is None else start // factor**rounds
    if start is None:
        assert rounds is not None  # a preset has one
        start = end * factor**rounds
    if rounds is None:
        rounds = 1
        while end * factor ** (rounds + 1) <= start:
            rounds += 1
    if end < 1 or start != end * factor**rounds:
        raise UsageError(
            f"rounds = {rounds} does not lead from {start} to {max(end, 1)} steps: need start-steps = {factor}^rounds * end-steps "
            f"(give two of --rounds, --start-steps, --end-steps)"
        )
    return rounds, start, end
