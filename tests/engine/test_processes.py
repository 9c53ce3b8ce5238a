"""Several processes: the same samples, the same losses, the same students; what happens when one is stopped or killed."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import ROOT, TINY_DISTILL, call
from tests.engine.processes import run, start

DISTILL = ("-m", "pdfast.distill", *TINY_DISTILL)
RESULTS = ["teacher/teacher.safetensors", "students/0002/student.safetensors", "students/0001/student.safetensors"]
# Long enough to be stopped in its middle.
LONGER = (*DISTILL, "--train.updates", "60", "--updates", "40", "--checkpoint-every", "5", "--log-every", "1")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(line["steps"], line["update"]): line["loss"] for line in lines if "update" in line}


def assert_same_course(folder, reference, atol=1e-6):
    """The losses of all updates, and the last weights."""
    ours, theirs = losses(folder), losses(reference)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) < atol
    for name in RESULTS:
        a, b = load_file(folder / name), load_file(reference / name)
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-3, atol=2e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("processes, shard", [(2, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_the_same_course_as_one_process(processes, shard, finished_run, tmp_path):
    """Replicas, parts, and both: across a teacher's training and two rounds."""
    text = run(processes, *DISTILL, "--engine.shard", str(shard), "--run-dir", str(tmp_path / "run"))
    assert f"{processes} processes, {processes // shard} copies in {shard} parts" in text
    assert_same_course(tmp_path / "run", finished_run)
    assert text.count("student, 1 step") == 1, "one process alone speaks"
    (row,) = json.loads((tmp_path / "run/students/0001/metrics.json").read_text())["evaluation"]
    (theirs,) = json.loads((finished_run / "students/0001/metrics.json").read_text())["evaluation"]
    for name in ("fd", "kd", "cs", "feature_distance", "diversity", "diversity_ratio", "contrast", "contrast_ratio"):
        assert row[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_a_batch_that_the_processes_do_not_divide(tmp_path):
    process = start(2, *DISTILL, "--batch-size", "15", "--run-dir", str(tmp_path / "run"))
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in text.splitlines() if line.startswith("pdfast: error: ")]
    assert len(lines) == 1 and "--batch-size 15 must be a multiple of 2: 2 processes" in lines[0]
    assert f'File "{ROOT}/pdfast/' not in text, "no traceback but torchrun's own"


def wait_for(folder, lines, process):
    log = folder / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)


def workers(process):
    """The processes that torchrun started, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0][5:])] = pid
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes, in two parts."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(2, *LONGER, "--engine.shard", "2", "--run-dir", str(folder))
    return folder


@pytest.mark.slow
def test_a_killed_rank_and_a_restart(undisturbed, tmp_path):
    """Under --max-restarts the job goes on by itself, to the same bytes."""
    folder = tmp_path / "run"
    flags = ("--standalone", "--max-restarts", "2")
    process = start(2, *LONGER, "--engine.shard", "2", "--run-dir", str(folder), torchrun=flags)
    for lines, rank in ((20, 1), (85, 0)):
        wait_for(folder, lines, process)
        os.kill(workers(process)[rank], signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]
    assert text.count("resuming") == 2 and "attempt_3" not in text
    assert [(folder / name).read_bytes() for name in RESULTS] == [(undisturbed / name).read_bytes() for name in RESULTS]


@pytest.mark.slow
def test_another_number_of_processes_goes_on(undisturbed, tmp_path):
    """4 -> 2 -> 1: the same samples, the same losses to rounding."""
    folder = tmp_path / "run"
    for processes, shard, lines in ((4, 4, 20), (2, 2, 80)):
        process = start(processes, *LONGER, "--engine.shard", str(shard), "--run-dir", str(folder))
        wait_for(folder, lines, process)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=120)
        assert "and saved it; the same command goes on from here" in text, text[-3000:]
    assert call("distill", *LONGER[2:], "--run", str(folder)) == 0
    assert_same_course(folder, undisturbed, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    folder = tmp_path / "run"
    flags = ("--engine.patience", "4", "--updates", "10000", "--run-dir", str(folder))
    process = start(2, *LONGER, *flags)
    wait_for(folder, 20, process)
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    try:
        text, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
        try:
            os.kill(hung, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert process.returncode != 0
    assert re.search(r"rank 0: rank 1 \(last seen at update \d+ of .*\) gives no sign of life", text), text[-3000:]


@pytest.mark.slow
def test_two_machines_that_meet_over_loopback(finished_run, tmp_path):
    """Two torchrun agents, as on two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    agents = []
    for rank in range(2):
        meeting = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port))
        agents.append(start(1, *DISTILL, "--engine.shard", "2", "--run-dir", str(folder), torchrun=meeting))
    for agent in agents:
        text, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, text[-3000:]
    assert_same_course(folder, finished_run)


@pytest.mark.slow
def test_killed_as_a_whole_and_started_again(undisturbed, tmp_path):
    """SIGKILL of torchrun and all its workers, three times, then to the end: the same bytes."""
    folder = tmp_path / "run"
    command = (*LONGER, "--engine.shard", "2", "--run-dir", str(folder))
    for lines in (15, 70, 110):
        process = start(2, *command)
        wait_for(folder, lines, process)
        for pid in (process.pid, *workers(process)):
            os.kill(pid, signal.SIGKILL)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
    run(2, *command)
    assert [(folder / name).read_bytes() for name in RESULTS] == [(undisturbed / name).read_bytes() for name in RESULTS]
