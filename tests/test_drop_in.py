"""docs/drop-in.md: the example runs, and what the page says of it and of the package is so."""

import ast
import difflib
import re
import runpy
import subprocess
import sys

import pytest
import torch

import pdfast_kernels
from pdfast_kernels.runtime.dispatch import constant_when_compiled
from tests.commands import ROOT, environment

PAGE = (ROOT / "docs" / "drop-in.md").read_text()


def test_the_package_imports_torch_and_triton_only():
    for path in (ROOT / "kernels" / "pdfast_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            packages = {name.partition(".")[0] for name in names}
            assert packages <= {"torch", "triton", "pdfast_kernels", *sys.stdlib_module_names}


def test_an_import_leaves_the_compiler_alone():
    code = "import sys, pdfast_kernels; print({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"

    def theirs():
        return 1

    def ours():
        return 1

    assert vars(torch.compiler.assume_constant_result(theirs)) == vars(constant_when_compiled(ours))


def test_the_operations_are_there():
    names = set(re.findall(r"`pdfast_kernels\.(\w+)\(", PAGE))
    assert len(names) == 8 and names <= set(pdfast_kernels.__all__)


def test_the_worked_example(capsys):
    files = [ROOT / "examples" / name for name in ("ddpm.py", "ddpm_accelerated.py")]
    before, after = (file.read_text().split('"""', 2)[2].splitlines() for file in files)
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:].strip()]
    (shown,) = re.findall("```diff\n(.*?)```", PAGE, re.DOTALL)
    assert shown.splitlines() == [line[0] + line[2:] for line in changed] and len(changed) < 10
    losses = [runpy.run_path(str(file))["train"]() for file in files]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "34 modules replaced, 0 left" in capsys.readouterr().out
