"""`benchmarks/gpu.sh`, up to the device: its command lines, what they import, and how a part ends."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks import tune
from tests.commands import ROOT, environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they would run")
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
MOST = 540  # seconds of a part
LACKED = "tyro docstring_parser typeguard shtab diffusers gradio nvidia apex liger_kernel xdist".split()
"""What need not be where PyTorch is."""


def gpu_sh(*arguments, **variables):
    given = os.environ | {"PYTHON": sys.executable, "DATA": "/a folder"} | {k: str(v) for k, v in variables.items()}
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], env=given, capture_output=True, text=True)


@pytest.fixture(scope="module")
def lines():
    """(part, seconds, command) of each."""
    names = re.findall(r'^(?:all|named)="(.*)"$', SCRIPT.read_text(), re.MULTILINE)
    listed = gpu_sh("--list", *" ".join(names).split())
    assert listed.returncode == 0, listed.stderr
    split = [shlex.split(line) for line in listed.stdout.splitlines()]
    assert {part for part, *_ in split} == set(" ".join(names).split())
    return [(part, int(seconds), command) for part, seconds, *command in split]


def test_each_part_ends_within_nine_minutes(lines):
    for part in {part for part, *_ in lines}:
        assert 0 < sum(seconds for name, seconds, _ in lines if name == part) <= MOST


def test_every_command_line_is_accepted_and_asks_for_a_gpu(lines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "INTERPRETED", False)  # as where there is a GPU
    commands = [command for *_, command in lines if "pytest" not in command]
    assert len(commands) > 13
    for python, m, module, *arguments in commands:
        assert (python, m) == (sys.executable, "-m")
        arguments = [argument.replace("OUT_DIR", str(tmp_path)) for argument in arguments]
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main(arguments)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and "GPU" in said, said


def test_a_plain_image_has_what_they_import(lines):
    """All modules of the parts, and the tests, where there is little besides PyTorch."""
    modules = sorted({command[2] for *_, command in lines if "pytest" not in command})
    tests = [command[command.index("pytest") + 1 :] for *_, command in lines if "pytest" in command]
    assert len(tests) == 3
    script = f"""
import importlib, sys
for name in {LACKED}:
    sys.modules[name] = None
for module in {modules}:
    importlib.import_module(module)
import pytest
for arguments in {tests}:
    if "-n" in arguments:
        del arguments[arguments.index("-n") : arguments.index("-n") + 2]
    assert pytest.main([*arguments, "--collect-only", "-q"]) == 0
from pdfast.cli import run_command
from pdfast.distill import main
run_command(main)
"""
    variables = environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.count("collected") >= 2 or done.stdout.count("tests/gpu/test_operations.py") >= 2, done.stdout
    assert done.returncode == 2, done.stderr[-2000:]
    assert re.fullmatch(r"pdfast: error: command lines are read by tyro, .*: pip install tyro", done.stderr.strip())


def test_without_a_gpu_it_is_one_line(tmp_path):
    done = gpu_sh(tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith("finds no GPU") and not done.stdout
    for arguments, said in [((), "say where to write"), ((tmp_path, "all"), "no part all: first, tests")]:
        done = gpu_sh(*arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_part_that_fails_says_what_did_and_the_next_one_runs(tmp_path):
    """And both find what the compilers kept."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\n'
        'echo "FAILED tests/gpu/test_x.py::test_y - assert 1 == 2"\n'
        'echo "$TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR"; [ "$2" = benchmarks.first ]\n'
    )
    python.chmod(0o755)
    done = gpu_sh(tmp_path / "out", "tests", "first", "sanitizer", PYTHON=python, PATH="/usr/bin:/bin")
    cache = f"{tmp_path}/out/cache/inductor {tmp_path}/out/cache/triton"
    failed = "FAILED tests/gpu/test_x.py::test_y - assert 1 == 2"
    assert done.stdout.splitlines() == [
        *["== tests: at most 240 seconds", failed, cache, "== tests: exit code 1"],
        *["== first: at most 200 seconds", failed, cache],
        "== sanitizer: there is no compute-sanitizer here",
    ]
    assert done.returncode == 1 and (tmp_path / "out" / "gpu.log").read_text().count(cache) == 2
