"""The distribution of the kernels alone, beside which pdfast, which has them too, refuses to be imported."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest

import pdfast
from pdfast.io.errors import UsageError
from pdfast.io.installation import check_owner_of_kernels
from tests.commands import ROOT, environment
from tests.distributions import build, copied

REFUSED = "pdfast and pdfast-kernels are both installed in"


def python(*arguments, cwd, path, interpreter=sys.executable):
    """Run Python away from the checkout, with nothing but `path` before its own packages."""
    kept = environment() | {"PYTHONPATH": path}
    return subprocess.run([interpreter, *arguments], cwd=cwd, env=kept, capture_output=True, text=True, check=False)


def test_what_both_distributions_say_is_the_same():
    alone, whole = (tomllib.loads((ROOT / f / "pyproject.toml").read_text())["project"] for f in ("kernels", ""))
    for field in ("license", "requires-python", "dynamic"):
        assert alone[field] == whole[field]
    assert set(alone["dependencies"]) < {*whole["dependencies"], *whole["optional-dependencies"]["test"]}
    assert (ROOT / "kernels/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_two_distributions_with_the_same_files_are_refused(tmp_path):
    """One line of a command, and an ImportError; nothing in a checkout, or where pdfast is alone."""
    check_owner_of_kernels(ROOT)
    (tmp_path / "pdfast").symlink_to(ROOT / "pdfast")
    (tmp_path / "pdfast-0.1.0.dist-info").mkdir()
    check_owner_of_kernels(tmp_path)
    (tmp_path / "pdfast_kernels-0.1.0.dist-info").mkdir()
    with pytest.raises(UsageError, match=REFUSED):
        check_owner_of_kernels(tmp_path)
    done = python("-m", "pdfast.distill", cwd=tmp_path, path=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"pdfast: error: {REFUSED} {tmp_path}")
    done = python("-c", "import pdfast", cwd=tmp_path, path=str(tmp_path))
    assert done.returncode == 1 and f"ImportError: {REFUSED} {tmp_path}" in done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The two wheels by the names of their distributions, built as for a release."""
    folder = tmp_path_factory.mktemp("wheels")
    source = copied(folder)
    for project in (source, source / "kernels"):
        build(project, folder, "--wheel")
    return {name: next(folder.glob(f"{name}-*.whl")) for name in ("pdfast", "pdfast_kernels")}


@pytest.mark.slow
def test_the_wheel_holds_exactly_the_package(wheels):
    alone, whole = (zipfile.ZipFile(wheels[name]) for name in ("pdfast_kernels", "pdfast"))
    package = {name for name in whole.namelist() if name.startswith("pdfast_kernels/")}
    (information,) = {name.split("/")[0] for name in alone.namelist()} - {"pdfast_kernels"}
    assert information == f"pdfast_kernels-{pdfast.__version__}.dist-info"
    assert {name for name in alone.namelist() if not name.startswith(information)} == package
    assert all(alone.read(name) == whole.read(name) for name in package)
    assert f"{information}/licenses/LICENSE" in alone.namelist()
    metadata = Parser().parsestr(alone.read(f"{information}/METADATA").decode())
    assert metadata["Name"] == "pdfast-kernels" and metadata["Version"] == pdfast.__version__
    assert metadata.get_all("Requires-Dist") == ["torch>=2.11", 'triton; sys_platform == "linux"']


ALONE = """
import sys
sys.modules["pdfast"] = None  # importing it is an ImportError
import pdfast_kernels, torch
x = torch.arange(64.0).view(1, 4, 4, 4).requires_grad_()
y = pdfast_kernels.group_norm(x, 2)
y.square().sum().backward()
print(pdfast_kernels.__file__, torch.allclose(y, torch.nn.functional.group_norm(x, 2)), bool(x.grad.isfinite().all()))
"""


@pytest.mark.slow
def test_the_wheel_works_alone(wheels, tmp_path):
    target = tmp_path / "target"
    install = ["install", "-q", "--no-deps", "--target", str(target), str(wheels["pdfast_kernels"])]
    assert python("-m", "pip", *install, cwd=tmp_path, path="").returncode == 0
    assert {path.name for path in target.iterdir()} == {
        "pdfast_kernels",
        f"pdfast_kernels-{pdfast.__version__}.dist-info",
    }
    done = python("-c", ALONE, cwd=tmp_path, path=str(target))
    assert done.stdout.split() == [str(target / "pdfast_kernels/__init__.py"), "True", "True"], done.stderr


@pytest.mark.slow
def test_the_line_gives_the_way_out(wheels, tmp_path):
    """Both in one environment, and what the line says to do. pip removes the shared files with either distribution."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    interpreter = tmp_path / "env" / "bin" / "python"

    def pip(*arguments):
        done = python("-m", "pip", "--python", str(interpreter), *arguments, cwd=tmp_path, path="")
        assert done.returncode == 0, done.stderr

    def imported():
        code = "import pdfast, importlib.util as u; print(u.find_spec('pdfast_kernels') is not None)"
        return python("-c", code, cwd=tmp_path, path="", interpreter=str(interpreter))

    pip("install", "-q", "--no-deps", str(wheels["pdfast"]))
    assert imported().stdout == "True\n"
    pip("install", "-q", "--no-deps", str(wheels["pdfast_kernels"]))
    assert REFUSED in imported().stderr
    pip("uninstall", "-q", "-y", "pdfast-kernels")
    assert imported().stdout == "False\n"
    pip("install", "-q", "--force-reinstall", "--no-deps", str(wheels["pdfast"]))
    assert imported().stdout == "True\n"
