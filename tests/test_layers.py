"""Which module imports which: what stands below knows nothing of what stands above it."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from tests.commands import ROOT


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in (ROOT / "pdfast").rglob("*.py")}


@cache
def imported_by(module: str) -> set[str]:
    """The modules of pdfast that a module imports anywhere in it, also in a function, but for types alone."""
    tree = ast.parse(MODULES[module].read_text())
    types_alone = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in types_alone:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return (found & MODULES.keys()) - {module, "pdfast"}


def reached_from(module: str) -> set[str]:
    reached, left = set(), [module]
    while left:
        for name in imported_by(left.pop()) - reached:
            reached.add(name)
            left.append(name)
    return reached


LAYERS = [
    ("io",),
    ("diffusion", "loss"),
    ("networks",),
    ("data",),
    ("flags", "diffusers_tables", "own_code", "schedule_config", "rounds", "config"),
    ("engine",),
    ("methods",),
    ("pretrained",),
    ("exporting",),
    ("evaluation",),
    ("report",),
    ("plan",),
    ("stages",),
    ("recipes", "arguments", "checks", "cli", "launch", "distill", "train", "sample", "evaluate", "export", "demo"),
]
"""From the ground up: a module imports what stands before it, or beside it in the same layer."""
COMMANDS_AMONG_DATA = {"pdfast.data.prepare", "pdfast.data.convert"}


def layer_of(module: str) -> int:
    if module in COMMANDS_AMONG_DATA:
        return len(LAYERS) - 1
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[1] in names)


def test_the_walk_finds_what_is_imported():
    assert {"pdfast.config", "pdfast.pretrained"} < reached_from("pdfast.distill")
    assert "pdfast.diffusers_tables" in reached_from("pdfast.config")


def test_each_layer_knows_only_what_stands_before_it():
    modules = MODULES.keys() - {"pdfast"}
    upward = [(a, b) for a in modules for b in imported_by(a) if layer_of(b) > layer_of(a)]
    assert not upward


def test_there_are_no_circles():
    """`prepare` raises a CycleError, which names the modules."""
    TopologicalSorter({module: imported_by(module) for module in MODULES}).prepare()


def test_folders_have_no_circles():
    """Nor have the rooms, each taken as a whole."""
    rooms: dict[str, set[str]] = {}
    for module in MODULES.keys() - COMMANDS_AMONG_DATA - {"pdfast"}:
        room = module.split(".")[1]
        rooms.setdefault(room, set()).update(name.split(".")[1] for name in imported_by(module))
    TopologicalSorter({room: others - {room} for room, others in rooms.items()}).prepare()
