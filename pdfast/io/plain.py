"""Configurations as plain data and back: strictly, so that what a file says is all that a configuration has, or one line says
what is wrong."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pdfast.io.errors import UsageError
from pdfast.io.reading import shown

T = TypeVar("T")
Readers = Mapping[Any, Callable[[Any, str], Any]]
"""Of types that are unions told apart by a field: what reads one from plain data; it gets the data and their place."""


def unstructure(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists, numbers and strings."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def structure(cls: type[T], plain: dict[str, Any], where: str, readers: Readers | None = None) -> T:
    """Structure plain data as a `cls`: the inverse of `unstructure`. UsageError that names the field for one unknown, missing or of a wrong type."""
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(plain, dict):
        raise UsageError(f"{where}: expected fields, found {shown(plain)}")
    for name in plain:
        if name not in known:
            raise UsageError(f"{where}: unknown field {shown(name)}; known are {', '.join(known)}")
    values = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name in plain:
            values[f.name] = _convert(hints[f.name], plain[f.name], f"{where}, {f.name}", readers or {})
        elif f.default is dataclasses.MISSING:
            raise UsageError(f"{where}: field {f.name!r} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _convert(kind: Any, value: Any, where: str, readers: Readers) -> Any:
    choices = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        origin = get_origin(choice)
        if choice in readers:
            return readers[choice](value, where)
        if dataclasses.is_dataclass(choice):
            return structure(choice, value, where, readers)  # type: ignore[arg-type]
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_convert(get_args(choice)[0], v, where, readers) for v in value)
        if origin is Literal and any(value == v and type(value) is type(v) for v in get_args(choice)):
            return value
        if origin is dict and isinstance(value, dict):
            return value
        if choice is Path and isinstance(value, str):
            return Path(value)
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(choice, type) and type(value) is choice:
            return value
    wanted = " or ".join(
        " or ".join(map(repr, get_args(c))) if get_origin(c) is Literal else getattr(c, "__name__", str(c))
        for c in choices
        if c is not type(None)
    )
    raise UsageError(f"{where}: {shown(value)} is not {wanted}")


def fields_of(cls: type, plain: dict[str, Any], names: Iterable[str], where: str) -> dict[str, Any]:
    """Convert those of the fields `names` of a configuration that `plain` has. UsageError that names one of a wrong type."""
    hints = get_type_hints(cls)
    return {name: _convert(hints[name], plain[name], f"{where}, {name}", {}) for name in names if name in plain}
