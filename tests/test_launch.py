"""`python -m pdfast.launch` and `make distill`: how they end, by exit code and last line."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from pdfast import launch
from pdfast.cli import LAUNCHED, _tell_torchrun, run_command
from tests.commands import ROOT, TINY_DISTILL, call, environment

SAVED = "and saved it; the same command goes on from here"


def ended(monkeypatch, capsys, failure, processes="1"):
    """The exit code and the lines of a launch whose processes end so."""

    def run(options):
        assert os.environ[LAUNCHED]
        assert (options.nproc_per_node, options.training_script) == (processes, "pdfast.distill")
        assert options.training_script_args == ["--run", "runs/a"]
        raise failure

    monkeypatch.setattr(launch, "run", run)
    flags = ["--standalone", "--nproc-per-node", processes, "-m", "pdfast.distill", "--run", "runs/a"]
    monkeypatch.setattr(sys, "argv", ["pdfast.launch", *flags])
    with pytest.raises(SystemExit) as end:
        run_command(launch.main)
    return end.value.code, capsys.readouterr().err.splitlines()


def failed(tmp_path, monkeypatch, failures):
    """What torchrun raises when processes end with these exit codes and last lines, by rank."""
    found = {}
    for rank, (code, line) in failures.items():
        file = tmp_path / f"error-{rank}.json"
        if line:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
            _tell_torchrun(line)
            monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
        found[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file))
    return ChildFailedError("pdfast.distill", found)


@pytest.mark.parametrize(
    "processes, failures, code, lines",
    [
        ("1", {0: (2, "pdfast: error: no such file")}, 2, ["pdfast: error: no such file"]),
        ("1", {0: (130, "pdfast: stopped at update 3")}, 130, []),  # the process has printed it
        ("2", {0: (2, "pdfast: error: no such file")}, 2, ["pdfast: error: rank 0: no such file"]),
        ("2", {1: (1, "pdfast: error: the disk is full")}, 1, ["pdfast: error: rank 1: the disk is full"]),
        ("2", {1: (-9, None)}, 1, ["pdfast: error: rank 1: it was killed by SIGKILL"]),
        ("1", {0: (-11, None)}, 1, ["pdfast: error: it was killed by SIGSEGV"]),
        ("2", {1: (130, "pdfast: stopped at update 3")}, 130, ["pdfast: rank 1: stopped at update 3"]),
        ("1", {0: (1, None)}, 1, ["pdfast: error: it ended with exit code 1; see what it said above"]),
        ("1", {0: (7, None)}, 1, ["pdfast: error: it ended with exit code 7; see what it said above"]),
    ],
)
def test_a_failure_is_one_line_and_the_code_of_the_process(
    processes, failures, code, lines, tmp_path, monkeypatch, capsys
):
    assert ended(monkeypatch, capsys, failed(tmp_path, monkeypatch, failures), processes) == (code, lines)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--nproc-per-node", "x", "-m", "pdfast.distill"], ["--nproc-per-node x"]),
        (["--nproc-per-node", "0", "-m", "pdfast.distill"], ["--nproc-per-node 0"]),
        (["--nproc-per-node", "xpu", "-m", "pdfast.distill"], ["--nproc-per-node xpu", "not available"]),
        (["--nnodes", "x", "-m", "pdfast.distill"], ["--nnodes x"]),
        (["--nnodes", "3:2", "-m", "pdfast.distill"], ["--nnodes 3:2"]),
        (["--max-restarts", "-1", "-m", "pdfast.distill"], ["max_restarts"]),
        (["--rdzv-backend", "x", "--rdzv-endpoint", "localhost:0", "-m", "pdfast.distill"], ["backend 'x'"]),
        (["--master-port", "x", "-m", "pdfast.distill"], ["--master-port", "'x'"]),
        (["-m", "pdfast.nosuch"], ["no module pdfast.nosuch"]),
        (["-m", "nosuch.distill"], ["no module nosuch.distill"]),
        (["-m", "pdfast.engine"], ["no module pdfast.engine"]),  # a package that does not run
        (["pdfast.distill"], ["no script pdfast.distill", "-m"]),
        (["--no-python", "pdfast.distill"], ["no program pdfast.distill"]),
        ([], ["training_script"]),
    ],
)
def test_what_cannot_be_launched_is_a_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pdfast.launch", *flags])
    with pytest.raises(SystemExit) as end:
        run_command(launch.main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert (
        end.value.code == 2
        and line.startswith("pdfast: error: ")
        and line.endswith("see python -m pdfast.launch --help")
    )
    for word in words:
        assert word in line


def test_a_signal_is_130_and_no_traceback(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, SignalException("got it", signal.SIGINT)) == (130, [])


@pytest.mark.parametrize("launched", [True, False])
def test_the_launcher_prints_the_line_of_a_process(launched, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if launched:
        monkeypatch.setenv(LAUNCHED, "1")
    assert call("distill", "--data", "nowhere", "--run", str(tmp_path / "run")) == 2
    assert "no data at nowhere" in (tmp_path / "error.json").read_text()
    assert capsys.readouterr().err.count("no data at nowhere") == (0 if launched else 1)


@pytest.mark.parametrize("file", [None, "missing/error.json"])
def test_a_line_that_cannot_be_left_is_printed(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if file:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / file))
    assert call("distill", "--data", "nowhere", "--run", str(tmp_path / "run")) == 2
    assert capsys.readouterr().err.count("no data at nowhere") == 1


def start(command):
    """As a shell in a terminal starts it: in a group of its own, which heeds Ctrl-C."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )


def make_distill(folder, *flags):
    """`make distill` with this interpreter in the place of the environment's."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (venv / "installed").touch()
    arguments = " ".join([*TINY_DISTILL, *flags, "--run", str(folder / "run")])
    return start(["make", "-s", "-o", str(venv / "installed"), f"VENV={venv}", "distill", f"ARGS={arguments}"])


def test_ctrl_c_of_make_distill_in_training(tmp_path):
    process = make_distill(tmp_path, "--train.updates", "100000", "--log-every", "1")
    log = tmp_path / "run/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    said = [line for line in text.splitlines() if line and not line.startswith("make")]
    assert said[-1].endswith(SAVED) and "Traceback" not in text and "elastic" not in text, text
    assert process.returncode != 0 and "130" in text


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.0, 4.0, 6.0])
def test_ctrl_c_of_make_distill_while_it_starts(seconds, tmp_path):
    process = make_distill(tmp_path, "--train.updates", "100000")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    said = [line for line in text.splitlines() if line and not line.startswith("make")]
    assert said[-1].endswith(("pdfast: stopped before there was anything to save", SAVED)), text
    assert "Traceback" not in text and process.returncode != 0


@pytest.mark.slow
def test_bad_input_in_two_processes(tmp_path):
    flags = [*TINY_DISTILL, "--batch-size", "15", "--run", str(tmp_path / "run")]
    command = ["-m", "pdfast.launch", "--standalone", "--nproc-per-node", "2", "-m", "pdfast.distill", *flags]
    process = start([sys.executable, *command])
    text, _ = process.communicate(timeout=120)
    (line,) = text.splitlines()
    assert re.match("pdfast: error: rank [01]: --batch-size 15 must be a multiple of 2", line)
    assert process.returncode == 2
