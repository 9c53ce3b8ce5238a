"""What a GPU would do in an update, seen without one: waits of the host, and the compiler's code for what doubles the resolution."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, environment

pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a build of torch without CUDA"),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    guard = tmp_path_factory.mktemp("guard") / "guard.so"
    of_torch = Path(torch.__file__).parent
    flags = f"-O0 -shared -fPIC -std=c++20 -I{of_torch}/include -D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = f"-L{of_torch}/lib -lc10 -ltorch_cpu -Wl,--no-as-needed,-rpath,{of_torch}/lib"
    source = Path(__file__).with_name("guard.cpp")
    command = ["g++", *flags.split(), str(source), "-o", str(guard), *libraries.split()]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the stand-in for a GPU does not fit torch {torch.__version__}: {built.stderr.strip()[:200]}")
    # Without the interpreter, which conftest chooses: the compiler looks at Triton's own functions.
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.fake_gpu.report", str(guard)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_host_never_waits_for_the_device_in_an_update(report):
    assert len(report["waits"]) == 10 and not any(report["waits"].values()), report["waits"]


def test_a_wait_is_seen(report):
    assert report["a wait"] == ["_local_scalar_dense", "_to_copy"]


def test_the_gradient_of_upsampling_is_not_added_up_by_atomics(report):
    assert report["atomics"].pop("PyTorch")[-1] > 0  # the test sees them
    assert {"ours", "EDM"} <= report["atomics"].keys()
    assert all(counts == [0, 0] for counts in report["atomics"].values()), report["atomics"]
