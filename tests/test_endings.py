"""How a process ends where torch or Python fails: a line that says what to do, and what other processes say."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from pdfast import cli
from pdfast.cli import run_command
from pdfast.engine import machine
from pdfast.io.errors import RunError
from tests.commands import TINY_DISTILL, call, environment

HUGE = 1 << 55  # bytes, more than any machine's address space


def end_of(function, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(function)
    (line,) = capsys.readouterr().err.splitlines()
    return end.value.code, line


def out_of_gpu_memory():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.12 GiB is free. "
        "Including non-PyTorch memory, this process has 77.98 GiB memory in use."
    )


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda: torch.empty(HUGE, dtype=torch.uint8), f"can't allocate memory: you tried to allocate {HUGE} bytes)"),
        (lambda: np.empty(HUGE, dtype=np.uint8), "Unable to allocate 32.0 PiB"),
        (lambda: bytearray(HUGE), "MemoryError"),
        (
            out_of_gpu_memory,
            "Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.12 GiB is free)",
        ),
    ],
)
def test_out_of_memory_is_a_line(function, words, capsys):
    code, line = end_of(function, capsys)
    assert code == 1 and line.startswith("pdfast: error: out of memory (") and words in line
    assert "--engine.micro-batches" in line and "--engine.recompute" in line


def test_other_failures_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_command(lambda: torch.ones(2) + torch.ones(3))


@pytest.fixture
def no_compiler():
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.parametrize("command, flags", [("distill", TINY_DISTILL), ("train", [])])
def test_no_compiler_is_said_before_anything_is_done(command, flags, no_compiler, tmp_path, capsys):
    given = [*flags, "--device", "cpu", "--engine.compile", "on", "--run", str(tmp_path / "run")]
    assert call(command, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "install g++" in line and "--engine.compile off" in line and not (tmp_path / "run").exists()


def test_no_compiler_for_what_only_draws(no_compiler, finished_run, tmp_path, capsys):
    flags = ["--compile", "on", "--device", "cpu", "--count", "4", "--out", str(tmp_path / "grid.png")]
    assert call("sample", str(finished_run / "students/0001"), *flags) == 2
    assert "install g++" in capsys.readouterr().err


def test_no_compiler_as_dynamo_says_it(capsys):
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InvalidCxxCompiler

    def compile():
        raise BackendCompilerFailed(print, InvalidCxxCompiler(), None)

    code, line = end_of(compile, capsys)
    assert code == 2 and "install g++" in line


@pytest.mark.parametrize("rank, said", [("0", "pdfast: warning: slower\n"), ("1", "")])
def test_one_process_says_our_warnings(rank, said, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(warnings, "formatwarning", None)
    with pytest.raises(SystemExit):
        run_command(lambda: None)
    assert warnings.formatwarning("slower", UserWarning, machine.__file__, 1, None) == said
    assert "of another library" in warnings.formatwarning("of another library", UserWarning, np.__file__, 1, None)


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_that_lost_another_ends_after_it(launched, tmp_path, monkeypatch, capsys):
    """So that the launcher prints the line of that one; torchrun alone has seen it printed."""
    waited = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if launched:
        monkeypatch.setenv(cli.LAUNCHED, "1")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def lose():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")

    with pytest.raises(SystemExit) as end:
        run_command(lose)
    assert end.value.code == RunError.exit_code
    assert "lost another process of the run" in (tmp_path / "error.json").read_text()
    assert bool(waited) == launched and ("lost another" in capsys.readouterr().err) == (not launched)


ONE_OF_SEVERAL = """
import atexit, sys
from pdfast.cli import run_command
from pdfast.engine import world
from pdfast.io.errors import UsageError

class Kept:
    def __del__(self):
        print("the interpreter was taken down")

kept = Kept()
atexit.register(print, "what asked to be told was told")

def main():
    world.opened_process_groups = sys.argv[2] == "2"
    print("finished")
    if sys.argv[1] == "2":
        raise UsageError("no such file")
    if sys.argv[1] == "1":
        raise ZeroDivisionError

run_command(main)
"""


@pytest.mark.parametrize("code, said", [(0, ""), (1, "ZeroDivisionError"), (2, "pdfast: error: no such file")])
@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_does_not_take_the_interpreter_down(code, said, processes):
    """Where a thread of gloo aborts it that has still to let go of a tensor (seen in 5 of 20 pairs), all its work done."""
    command = [sys.executable, "-c", ONE_OF_SEVERAL, str(code), str(processes)]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    lines = ["finished", "what asked to be told was told"]
    assert process.stdout.splitlines() == lines + ["the interpreter was taken down"] * (processes == 1)
    assert process.returncode == code and process.stderr.strip().endswith(said)
