"""How fields become flags: marks of tyro, which reads command lines. Where it is not installed they mark nothing, and what needs
no command line runs: benchmarks, tests on a GPU, configurations in somebody's own program."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from pdfast.io.errors import UsageError

if TYPE_CHECKING:
    from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
else:
    try:
        from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
    except ImportError:
        FlagCreatePairsOff = Positional = Suppress = None

        def arg(**options: Any) -> None:
            pass


__all__ = [
    "FlagCreatePairsOff",
    "OptionalFloat",
    "OptionalInt",
    "OptionalPath",
    "OptionalString",
    "Positional",
    "Suppress",
    "arg",
    "leave_out",
    "reader",
]

OptionalFloat = Annotated[float | None, arg(metavar="FLOAT")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
OptionalString = Annotated[str | None, arg(metavar="STR")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH")]


def leave_out(configuration: type, *fields: str) -> None:
    """Have no flags for fields of a configuration, whose own module knows nothing of command lines."""
    for name in fields:
        kind: Any = configuration.__annotations__[name]
        configuration.__annotations__[name] = Annotated[kind, Suppress]


def reader() -> ModuleType:
    """tyro. UsageError where it, or what it needs, is not installed."""
    try:
        import tyro
    except ImportError as error:
        raise UsageError(
            f"command lines are read by tyro, which cannot be imported ({error}): pip install tyro"
        ) from None
    return tyro
