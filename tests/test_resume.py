"""Nothing is lost: killed at any instant, interrupted, or with a damaged checkpoint, the same command ends with the same bytes."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from pdfast.engine import checkpoint
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.world import World
from tests.commands import TINY_DISTILL, call, spawn

RESULTS = ["teacher/teacher.safetensors", "students/0002/student.safetensors", "students/0001/student.safetensors"]
# Long enough to be killed in its middle: some seconds of training in each stage.
LONGER = [*TINY_DISTILL, "--train.updates", "150", "--updates", "60", "--checkpoint-every", "10"]


def results(run):
    return [(run / name).read_bytes() for name in RESULTS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert call("distill", *LONGER, "--run", str(run)) == 0
    return results(run)


def lines(run):
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def kill_at_random(run, seed, kills, *flags):
    """SIGKILL the command at `kills` seeded moments of its life, then let it end; returns how often it was really killed.

    A moment is a number of logged lines, which no other load of the machine moves, and part of a second more.
    """
    moments = random.Random(seed)
    killed, lines_in_all = 0, (150 + 2 * 60) // 5
    for _ in range(kills):
        process = spawn("distill", *LONGER, "--log-every", "5", "--run", str(run), *flags)
        reached = lines(run) + moments.randint(0, lines_in_all // (kills + 1))
        while process.poll() is None and lines(run) < reached:
            time.sleep(0.02)
        try:
            process.communicate(timeout=moments.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    assert call("distill", *LONGER, "--run", str(run), *flags) == 0
    return killed


def test_killed_at_random_moments(undisturbed, tmp_path):
    assert kill_at_random(tmp_path / "run", 0, 3) > 1
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_killed_many_times(undisturbed, tmp_path, seed):
    assert kill_at_random(tmp_path / "run", seed, 5) > 0
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.gpu
def test_killed_on_a_gpu(tmp_path):
    """In bf16, compiled and as a CUDA graph; each update is in the log once, and the report is there."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    run = tmp_path / "run"
    assert kill_at_random(run, 0, 2, "--device", "cuda", "--log-every", "1") > 0
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for steps, updates in ((None, 150), (2, 60), (1, 60)):
        seen = [entry["update"] for entry in entries if "update" in entry and entry.get("steps") == steps]
        assert seen == list(range(1, updates + 1))
    assert all((run / name).exists() for name in (*RESULTS, "report.html"))


class Killed(BaseException):
    """Stands for a SIGKILL at an exact place: nothing between there and the top of the process handles it."""


def crash(monkeypatch, target, after):
    """Make the function `target` ("module.name") end the process at its `after`-th call."""
    import pkgutil

    owner, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize(
    "target, after",
    [
        ("pdfast.methods.Denoise.targets", 8),  # in the teacher's training
        ("pdfast.evaluation.evaluator.sample", 2),  # in the teacher's evaluation
        ("pdfast.stages.write_folder", 1),  # before the teacher is written
        ("pdfast.methods.Progressive.targets", 1),  # before the first update of a round
        ("pdfast.methods.Progressive.targets", 15),  # in the middle of the last round
        ("pdfast.engine.parallelize.set_weights", 3),  # where the student of a round becomes its teacher
        ("pdfast.engine.checkpoint.save_file", 2),  # before a checkpoint is on the disk
        ("pdfast.stages.write_folder", 2),  # before the last student is written
        ("pdfast.distill.build_report", 2),  # between two rounds
        ("os.rename", 4),  # while a checkpoint becomes visible
    ],
)
def test_stopped_at_every_stage(finished_run, tmp_path, monkeypatch, written_at_once, target, after):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash(patch, target, after)
        with pytest.raises(Killed):
            call("distill", *TINY_DISTILL, "--run", str(run))
    assert call("distill", *TINY_DISTILL, "--run", str(run)) == 0
    assert results(run) == results(finished_run)
    assert logged(run) == logged(finished_run)


def logged(run):
    """Of each line what does not depend on the clock: its stage, update or warning, and what was computed."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = "steps update message loss loss_by_step grad_norm learning_rate images skipped".split()
    return [[line.get(name) for name in names] for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(number, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    process = spawn("distill", *LONGER, "--log-every", "1", "--run", str(run))
    log = run / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 30):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 130 and "the same command goes on" in last and "Traceback" not in errors
    assert Checkpoints(run, "teacher", World(torch.device("cpu"))).latest().update > 20
    assert call("distill", *LONGER, "--run", str(run)) == 0
    assert "resuming the teacher at update" in capsys.readouterr().out
    assert results(run) == undisturbed


class AtOnce:
    """In place of a thread: what it is to do is done when it starts."""

    def __init__(self, target, args, daemon):
        self.start, self.join, self.is_alive = lambda: target(*args), lambda: None, lambda: False


@pytest.fixture
def written_at_once(monkeypatch):
    monkeypatch.setattr(checkpoint, "Thread", AtOnce)


@pytest.fixture(scope="module")
def killed_in_the_round(tmp_path_factory):
    run = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Thread", AtOnce)
        crash(patch, "pdfast.methods.Progressive.targets", 9)
        with pytest.raises(Killed):
            call("distill", *TINY_DISTILL, "--run", str(run))
    return run


@pytest.fixture
def stopped_in_the_round(killed_in_the_round, tmp_path):
    """A copy of its own, and the checkpoints of its round."""
    run = tmp_path / "run"
    shutil.copytree(killed_in_the_round, run)
    folders = sorted((run / "checkpoints").glob("student-0002-*"))
    assert [f.name[-2:] for f in folders] == ["03", "06"]
    return run, folders


@pytest.mark.parametrize("damage", ["truncated", "tampered", "no-meta", "half-json"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(damage, finished_run, stopped_in_the_round, capsys):
    run, (_, newest) = stopped_in_the_round
    break_checkpoint(newest, damage)
    assert call("distill", *TINY_DISTILL, "--run", str(run)) == 0
    captured = capsys.readouterr()
    assert f"{newest} is damaged" in captured.err and "resuming the round to 2 steps at update 3" in captured.out
    assert results(run) == results(finished_run)


def break_checkpoint(folder, damage):
    weights, meta = folder / "rank-0000.safetensors", folder / "state.json"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "tampered":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no-meta":
        meta.unlink()
    else:
        meta.write_text(meta.read_text()[:20])


def test_with_every_checkpoint_damaged_it_stops_and_says_so(stopped_in_the_round, capsys):
    run, folders = stopped_in_the_round
    for folder in folders:
        break_checkpoint(folder, "truncated")
    capsys.readouterr()
    assert call("distill", *TINY_DISTILL, "--run", str(run)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "every checkpoint of this stage is damaged" in last and "delete them" in last
    assert (run / "teacher/teacher.safetensors").exists()
