"""Plain data from files of which nothing is known: what comes back is whole and plain, or a UsageError says in one line
what is wrong.

No pickle, no link to nowhere, no pipe that would be waited for, no nesting that the interpreter cannot follow, no number
that is not finite.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pdfast.io.errors import UsageError

LARGEST = 8 << 20  # bytes of text; a configuration has a few thousand
DEEPEST = 64  # lists and fields within each other
MOST = 1_000_000  # values, those counted again that YAML repeats by name
LONGEST = 128  # bits of a whole number
SHOWN = 100  # characters of a value in a message


def shown(value: Any) -> str:
    """Return a value as a message shows it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def no_file(path: Path) -> str:
    """Return what is there in the place of a file, for people."""
    if path.is_dir():
        return "it is a folder"
    return "it is no regular file" if path.exists() else "there is no such file"


def read_text(path: Path) -> str:
    """Return the text of a file. UsageError where it is missing, no regular file, too large for what it is, or not UTF-8."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"cannot read {path}: {no_file(path)}")
        if path.stat().st_size > LARGEST:
            raise UsageError(f"cannot read {path}: it has more than {LARGEST >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """Return JSON as plain data. ValueError, in one line, for anything else, NaN and (unless `infinite`) infinities among
    it."""

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise ValueError(f"{name} is no number")

    try:
        return checked(json.loads(text, parse_constant=constant), infinite=infinite)
    except RecursionError:
        raise ValueError(f"its values are nested more than {DEEPEST} deep") from None


def checked(value: Any, *, infinite: bool = False) -> Any:
    """Return the value, where it is plain data as JSON knows it. ValueError where it is not, is nested too deep or too
    large."""
    left, level, depth = MOST, [value], 0
    while level:
        left, depth = left - len(level), depth + 1
        if depth > DEEPEST:
            raise ValueError(f"its values are nested more than {DEEPEST} deep")
        if left < 0:
            raise ValueError(f"it has more than {MOST:,} values")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise ValueError(f"{shown(key)} is not the name of a field")
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not (math.isfinite(item) or (infinite and math.isinf(item))):
                raise ValueError(f"{item} is no number")
            elif isinstance(item, int) and item.bit_length() > LONGEST:
                raise ValueError(f"{shown(item)} is too large a number")
            elif not isinstance(item, str | int | float | None):
                raise ValueError(f"{shown(item)} is of no plain kind")
            if len(below) > left:
                raise ValueError(f"it has more than {MOST:,} values")
        level = below
    return value


def read_json(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """Return a JSON object. UsageError where the file is missing or damaged. infinite: Infinity is a number, as Python
    writes it."""
    text = read_text(path)
    try:
        value = parse_json(text, infinite=infinite)
    except ValueError as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object")
    return value


def _check_brackets(text: str) -> None:
    """Raise a ValueError where so many are open at once that YAML's reader, whose time grows with their square, would seem
    to hang."""
    depth = 0
    for bracket in re.finditer(r"[][{}]", text):
        depth = max(depth + (1 if bracket[0] in "[{" else -1), 0)
        if depth > 4 * DEEPEST:
            raise ValueError(f"its values are nested more than {DEEPEST} deep")


def load_yaml(path: Path) -> dict[str, Any]:
    """Return a saved configuration, as plain data. UsageError where the file is missing or not YAML."""
    text = read_text(path)
    try:
        _check_brackets(text)
        plain = checked(yaml.safe_load(text))
    except Exception as error:  # what stands for numbers and dates is parsed by readers that raise many kinds
        reason = "its values are nested too deep" if isinstance(error, RecursionError) else error
        raise UsageError(f"cannot read the configuration {path}: {reason}") from None
    if not isinstance(plain, dict):
        raise UsageError(f"{path} is not a configuration: expected fields and values")
    return plain


def read_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file. UsageError where it is missing, damaged, or holds anything but numbers."""
    try:
        if not path.is_file():
            raise FileNotFoundError(no_file(path))
        with open(path, "rb") as file:  # given the path, NumPy leaves a damaged file open
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise ValueError("it holds something other than an array of numbers")
    except Exception as error:  # its header is a Python expression, read by a parser that raises many kinds
        # NumPy advises to load pickles, of any file that it does not know.
        reason = "it is no .npy file of numbers" if "pickle" in str(error) else str(error) or type(error).__name__
        raise UsageError(f"cannot read the array {path}: {reason}") from None
    return array
