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


def test_the_walk_finds_what_is_imported():
    assert {"pdfast.config", "pdfast.teachers"} < reached_from("pdfast.distill")
    assert "pdfast.diffusers_tables" in reached_from("pdfast.config")


def test_the_configuration_knows_no_teachers_and_they_know_no_run():
    teachers = {module for module in MODULES if module.startswith("pdfast.teachers")}
    assert not teachers & reached_from("pdfast.config")
    assert all("pdfast.config" not in reached_from(module) for module in teachers)


def test_the_mathematics_and_the_networks_stand_below():
    for module in MODULES:
        if module.startswith("pdfast.diffusion"):
            assert all(name.startswith("pdfast.diffusion") for name in reached_from(module)), module
        elif module.startswith("pdfast.networks"):
            own = ("pdfast.networks", "pdfast.diffusion", "pdfast.bounds", "pdfast.errors")
            assert all(name.startswith(own) for name in reached_from(module)), module


def test_there_are_no_circles():
    """`prepare` raises a CycleError, which names the modules."""
    TopologicalSorter({module: imported_by(module) for module in MODULES}).prepare()
