"""The kernels as others take them: the tree that kernels/assemble.py writes, loaded by Hugging Face's own `kernels`, beside the
package and where there is no such package."""

import ast
import inspect
import runpy
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

import pdfast
import pdfast_kernels
from pdfast_kernels.runtime.configs import Table, kernel_name
from tests.commands import ROOT, environment

# Not `kernels`, which the folder of that name would be.
pytest.importorskip("kernels.load", reason="Hugging Face's `kernels` is not installed: pip install kernels")
hub = import_module("kernels")
ASSEMBLE = [sys.executable, str(ROOT / "kernels" / "assemble.py")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    subprocess.run([*ASSEMBLE, str(folder)], env=environment() | {"PYTHONPATH": ""}, check=True)
    return folder


@pytest.fixture(scope="module")
def loaded(tree):
    """The assembled copy in this process, which has imported the package too."""
    return hub.get_local_kernel(tree)


def values(kernels, mode):
    """Return an operation's values and gradients, and what an optimizer makes of these."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 8, 4, 4), (8,), (8,)))
    x = x.to(memory_format=torch.channels_last)
    parameters = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    optimizer = kernels.FusedAdamW(parameters[1:], lr=0.1)
    with kernels.use(mode):
        y = kernels.group_norm(x, 4, weight, bias, silu=True)
        y.square().sum().backward()
        optimizer.step()
    return [y.detach(), *(tensor.grad for tensor in parameters), weight.detach(), bias.detach()]


def same(tensors, others):
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


ALONE = f"""
import sys
sys.modules["pdfast_kernels"] = sys.modules["pdfast"] = None  # importing them is an ImportError, installed or not
from pathlib import Path
import kernels, torch
{inspect.getsource(values)}
loaded = kernels.get_local_kernel(Path(sys.argv[1]))
torch.save([values(loaded, mode) for mode in ("reference", "triton")], sys.argv[2])
"""


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_beside_the_package(loaded, mode):
    assert loaded.group_norm is not pdfast_kernels.group_norm
    assert same(values(loaded, mode), values(pdfast_kernels, mode))


def test_without_the_package(tree, tmp_path):
    command = [sys.executable, "-c", ALONE, str(tree), str(tmp_path / "values")]
    subprocess.run(command, env=environment() | {"PYTHONPATH": "", "TRITON_INTERPRET": "1"}, cwd=tmp_path, check=True)
    for mode, theirs in zip(("reference", "triton"), torch.load(tmp_path / "values"), strict=True):
        assert same(theirs, values(pdfast_kernels, mode))


def operations(namespace):
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    return {name for space, name in names if space == namespace}


def test_each_copy_registers_its_operations_for_itself(loaded):
    assert operations(loaded.__name__) == operations("pdfast_kernels") and "group_norm" in operations("pdfast_kernels")


def test_the_names_and_what_is_imported(tree, loaded):
    assert loaded.__all__ == pdfast_kernels.__all__ and all(hasattr(loaded, name) for name in loaded.__all__)
    variants = sorted((tree / "build").glob("torch-*"))
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda"]
    for path in (path for variant in variants for path in variant.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name.partition(".")[0] for name in names} <= {"torch", "triton", *sys.stdlib_module_names}, path


def test_the_metadata(tree):
    ids = set()
    for variant in (tree / "build").glob("torch-*"):
        metadata = hub.Metadata.read_from_file(variant / "metadata.json")
        assert metadata.version == int(pdfast.__version__.split(".")[0]) and not metadata.python_depends
        metadata.digest.validate(type(metadata.digest).hash_variant(metadata.digest.algorithm, variant))
        ids.add(metadata.id)
    assert len(ids) == 2 and all(name.isidentifier() for name in ids)


def tables(package):
    """All tables of a copy by name, with kernels by theirs: each copy has its own."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    kind = import_module(f"{package}.runtime.configs").Table
    found = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, kind)}
    return {
        name: {
            arch: [[kernel_name(value) if callable(value) else value for value in row] for row in rows]
            for arch, rows in table.rows.items()
        }
        for name, table in found.items()
    }


def test_launch_configurations_are_files(loaded):
    copy = f"{loaded.__name__}.pdfast_kernels"
    assert tables(copy) == tables("pdfast_kernels") and len(tables(copy)) > 8
    files = import_module(f"{copy}.runtime.configs")._files()
    assert {name: set(rows) for name, rows in tables(copy).items()} == {
        name: {arch for arch, of_arch in files.items() if name in of_arch} for name in tables(copy)
    }


def test_rows_of_files_come_in_place_of_those_in_the_code(monkeypatch):
    configs = import_module("pdfast_kernels.runtime.configs")
    row = {"elements": None, "block": 8, "num_warps": 1}
    monkeypatch.setattr(configs, "_files", lambda: {90: {"example": [row]}, 80: {"another": [row]}})
    shipped = configs.Blocks(configs.UNBOUNDED, 16, 2)
    table = Table("example", {configs.ANY: (shipped,), 90: (shipped,)})
    assert table.row(90, 1) == configs.Blocks(configs.UNBOUNDED, 8, 1) and table.row(80, 1) == shipped


copy = None


class CallsTheCopy(nn.Module):
    def forward(self, x):
        return copy.group_norm(x, 2)


def test_accelerate_of_the_copy(loaded, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU())
    x = torch.ones(2, 3, 8, 8)
    expected = model(x)
    assert loaded.accelerate(model).replaced
    torch.testing.assert_close(model(x), expected)
    loaded.restore(model)
    assert torch.equal(model(x), expected)
    monkeypatch.setitem(globals(), "copy", loaded)
    assert loaded.accelerate(CallsTheCopy()).already == [("", "calls pdfast_kernels itself")]


def test_only_into_a_new_folder(tree, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["assemble.py", str(tree)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(ASSEMBLE[1], run_name="__main__")
    assert f"{tree} is not empty" in capsys.readouterr().err
