"""The Makefile's environment: made once, with one clear line where it can't be made. Nothing is really installed here."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import pdfast
from tests.commands import ROOT
from tests.distributions import build, copied

FILES = ["Makefile", "pyproject.toml", "setup.py", "constraints.txt", ".ci/environment"]

# Stands for Python: tells a version, and makes a .venv whose pip writes down what it was asked, or fails as told.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) exit {too_old} ;;
    -V) echo "Python {version}" ;;
    "-m venv .venv")
        mkdir -p .venv/bin
        printf '#!/bin/sh\\necho "$@" >>pip-calls\\n{pip}\\n' >.venv/bin/python
        chmod +x .venv/bin/python ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the environment is made from."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def fake_python(checkout, version="3.12.1", pip="exit 0"):
    path = checkout / "fake-python"
    too_old = int(tuple(map(int, version.split("."))) < (3, 11))
    path.write_text(FAKE_PYTHON.format(too_old=too_old, version=version, pip=pip))
    path.chmod(0o755)
    return str(path)


def make(checkout, target, **variables):
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHON", "TORCH", "TORCH_INDEX", "ARGS", "MAKEFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["make", "-s", target], cwd=checkout, env=kept | variables, capture_output=True, text=True, check=False
    )


def error_line(done):
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("pdfast: error:")]
    return line


def test_the_environment_is_made_once(checkout):
    python = fake_python(checkout)
    for _ in range(2):
        assert make(checkout, "distill", PYTHON=python).returncode == 0
    calls = (checkout / "pip-calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls if "install" in call] == [
        "torch==2.13.0",
        ".[lint,test]",
        "nvidia-dali-cuda130",
    ]
    runs = [call for call in (checkout / "pip-calls").read_text().splitlines() if "pdfast." in call]
    assert runs == ["-m pdfast.launch --standalone -m pdfast.distill --rounds 8"] * 2


def test_torch_can_be_chosen(checkout):
    variables = {"TORCH": "torch==2.12.0", "TORCH_INDEX": "http://here/cpu"}
    assert make(checkout, "environment", PYTHON=fake_python(checkout), **variables).returncode == 0
    first = (checkout / "pip-calls").read_text().splitlines()[0]
    assert first.endswith("--no-deps --index-url http://here/cpu torch==2.12.0")


def test_python_too_old_or_absent(checkout):
    line = error_line(make(checkout, "test", PYTHON=fake_python(checkout, "3.9.2")))
    assert "needs Python 3.11 or newer" in line and "Python 3.9.2" in line
    assert "no PYTHON=nowhere" in error_line(make(checkout, "test", PYTHON="nowhere"))
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    "said, words",
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no space left"),
        ("NewConnectionError: Failed to establish a new connection", "PIP_INDEX_URL"),
        ("ERROR: Could not find a version that satisfies torch==9 (from versions: none)", "PIP_INDEX_URL"),
        ("ERROR: No matching distribution found for torch==9", "No matching distribution found for torch==9"),
    ],
)
def test_an_install_that_fails(checkout, said, words):
    """One line, and no stamp: the next make tries again."""
    python = fake_python(checkout, pip=f'echo "{said}" >&2; exit 1')
    assert words in error_line(make(checkout, "test", PYTHON=python))
    assert words in error_line(make(checkout, "test", PYTHON=python))


def test_no_space_before_it_begins(checkout):
    folder = checkout / "bin"
    folder.mkdir()
    (folder / "df").write_text("#!/bin/sh\necho head\necho disk 9 9 123 99% /\n")
    (folder / "df").chmod(0o755)
    done = make(checkout, "test", PYTHON=fake_python(checkout), PATH=f"{folder}:{os.environ['PATH']}")
    assert "123 MB free" in error_line(done)


def test_an_index_that_is_not_there(checkout):
    """With the real Python and pip, and no index."""
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    line = error_line(
        make(checkout, "test", PYTHON=sys.executable, PIP_EXTRA_INDEX_URL="", TORCH="torch==2.13.0", **nowhere)
    )
    assert "no package index could be reached for torch==2.13.0" in line


def test_kernels_must_stay_a_bare_folder(checkout):
    (checkout / "kernels").mkdir()
    (checkout / "kernels/__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("kernels/__init__.py must not exist")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of what `python -m build` makes: the source distribution, and the wheel made of that."""
    folder = tmp_path_factory.mktemp("built")
    source = copied(folder)
    caches = "pdfast/__pycache__/cli.cpython-311.pyc", "tests/__pycache__/a.pyc"
    of_kernels = (
        "kernels/build/lib/pdfast_kernels/a.py",
        "kernels/dist/a.whl",
        "kernels/pdfast_kernels.egg-info/PKG-INFO",
    )
    for stray in ("runs/digits/config.yaml", *caches, *of_kernels):
        (source / stray).parent.mkdir(parents=True)
        (source / stray).touch()
    build(source, folder)
    return folder


@pytest.mark.slow
def test_the_source_distribution_is_the_repository(built):
    (archive,) = built.glob("pdfast-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    assert {*FILES, "README.md", "LICENSE", "kernels/README.md", "docs/method.md", "tests/commands.py"}
    assert {"examples/flow_teacher.py", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml"} <= names
    assert {"pdfast/data/digits.npz", "pdfast/report/report.html.jinja", "kernels/pdfast_kernels/py.typed"} <= names
    strays = ("runs", "kernels/build", "kernels/dist", "kernels/pdfast_kernels.egg-info")
    assert not [name for name in names if name.startswith(strays) or "cache__" in name]


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_stray(built):
    (wheel,) = built.glob("pdfast-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    information = wheel.name.rsplit("-", 3)[0] + ".dist-info"
    assert {name.split("/")[0] for name in names} - {information} == {"pdfast", "pdfast_kernels"}
    files = {path.relative_to(folder) for folder in (ROOT, ROOT / "kernels") for path in folder.glob("pdfast*/**/*.*")}
    kept = {str(path) for path in files if path.suffix != ".pyc" and path.parts[0] in ("pdfast", "pdfast_kernels")}
    assert {name for name in names if not name.startswith(information)} == kept
    assert any(name.endswith("licenses/LICENSE") for name in names)


AWAY = """
import pdfast, pdfast_kernels
from pathlib import Path
from pdfast.recipes import PRESETS
print(*(Path(package.__file__).parents[1] for package in (pdfast, pdfast_kernels)), *PRESETS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_a_distribution_works_away_from_the_checkout(built, tmp_path, kind):
    (distribution,) = built.glob(f"pdfast-*.{kind}")
    assert pdfast.__version__ in distribution.name
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def python(*arguments):
        command = [sys.executable, *arguments]
        surroundings = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=elsewhere, env=surroundings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(distribution))
    presets = "digits fashion cifar10-fast cifar10 imagenet64 lsun128"
    assert python("-c", AWAY).split() == [str(target), str(target), *presets.split()]
    assert not (target / "kernels").exists()
    assert "8 rounds, 256 -> 1 steps" in python("-m", "pdfast.distill", "--rounds", "8", "--dry-run", "--device", "cpu")
    assert "--steps" in python("-m", "pdfast.sample", "--help")
    assert not list(elsewhere.iterdir())
