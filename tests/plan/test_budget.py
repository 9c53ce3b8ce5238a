"""Minutes become updates once: measured when a run begins, written into its configuration, and read from there."""

import dataclasses
import shutil
import time

import pytest
import torch
import yaml

from pdfast import distill
from pdfast.config import KeptConfig
from pdfast.engine.machine import open_machine
from pdfast.io.errors import UsageError
from pdfast.methods import method_of_round
from pdfast.plan.budget import DRAWN_SHARE, TEACHER_SHARE, divide, seconds_of_forward
from pdfast.recipes import preset
from tests.commands import TINY_NETWORK, call, one_line
from tests.engine.processes import run as run_processes

RUN = [
    *TINY_NETWORK,
    *"--device cpu --evaluation.num-samples 64 --train.batch-size 16 --batch-size 16 --plan 8,2,1 --method progressive".split(),
]
PLAN = {"plan": "256,64,8,4,1", "rounds": 4, "start_steps": 256, "end_steps": 1}


@pytest.mark.parametrize("method", ["progressive", "tract", "progressive,4:pairs,1:pairs"])
def test_what_is_divided_is_spent(method):
    """Counted by hand: the images of all updates, times what each costs."""
    config = dataclasses.replace(preset("digits"), method=method, kept=KeptConfig(), batch_size=128, **PLAN)
    divided = divide(config, method_of_round, 2e6)
    assert divided.train.updates * 128 * 3 == pytest.approx(TEACHER_SHARE * 2e6, rel=0.01)
    each = {
        "progressive": {64: 7, 8: 11, 4: 5, 1: 7},
        "tract": {64: 5, 8: 5, 4: 5, 1: 5},
        "progressive,4:pairs,1:pairs": {64: 7, 8: 11, 4: 3, 1: 3},
    }[method]
    pairs = divided.kept.count * 8 if "pairs" in method else 0
    if pairs:
        assert pairs == pytest.approx(DRAWN_SHARE * (1 - TEACHER_SHARE) * 2e6, rel=0.01)
    spent = sum(divided.updates_at(steps) * 128 * cost for steps, cost in each.items()) + pairs
    assert spent == pytest.approx((1 - TEACHER_SHARE) * 2e6, rel=0.02)
    assert divided.updates_at(64) / divided.updates_at(1) == pytest.approx(1 / 12, rel=0.05)
    of_four = 1 / 2 if "pairs" in method else 1 / 4
    assert divided.updates_at(4) / divided.updates_at(1) == pytest.approx(of_four, rel=0.05)
    given = dataclasses.replace(config, teacher="a folder")
    assert divide(given, method_of_round, 2e6).updates_at(1) > 1.5 * divided.updates_at(1), "all for the rounds"


def test_too_few_minutes():
    config = dataclasses.replace(preset("digits"), minutes=0.001, **PLAN)
    with pytest.raises(UsageError, match=r"--minutes 0.001 are too few .* 4 rounds"):
        divide(config, method_of_round, 1000)


def test_measured_once_and_then_exact(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = ["distill", *RUN, "--run", str(run), "--minutes", "0.2"]
    monkeypatch.setattr(distill, "seconds_of_forward", lambda *_: 12 / 8000)
    assert call(*command, "--dry-run") == 0 and not run.exists()
    assert call(*command) == 0
    assert "updates for 0.2 minutes: 71 of the teacher, rounds 17,1:34" in capsys.readouterr().out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["minutes"], saved["train"]["updates"], saved["updates"]) == (0.2, 71, "17,1:34")
    student = (run / "students/0001/student.safetensors").read_bytes()

    def measured_again(*_):
        raise AssertionError("it is written in the configuration")

    monkeypatch.setattr(distill, "seconds_of_forward", measured_again)
    for folder in ("students/0001", "students/0002"):
        (run / folder).rename(tmp_path / folder.replace("/", "-"))
    assert call(*command) == 0
    assert (run / "students/0001/student.safetensors").read_bytes() == student
    assert call(*command, "--dry-run") == 0
    assert "71 " in capsys.readouterr().out
    one_line(capsys, call(*command[:-1], "0.3"), 2, "minutes = 0.2, now it is 0.3")


def test_it_is_measured_as_it_is_trained():
    """Next to forward and backward of the same network by plain PyTorch, within a factor: a machine may be busy."""
    config = dataclasses.replace(preset("digits"), device="cpu", batch_size=64)
    with open_machine(config) as machine:
        seconds = seconds_of_forward(config, machine)
    network = config.network.build()
    z, phi = torch.zeros(64, 1, 8, 8), torch.zeros(64)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        network(z, phi, None).square().mean().backward()
        times.append(time.perf_counter() - began)
    assert 0.2 < 3 * 64 * seconds / min(times) < 5


@pytest.mark.slow
def test_two_processes_divide_alike(tmp_path):
    """Measured by both, divided once: they go on together, and so does a resume."""
    run = tmp_path / "run"
    command = ["-m", "pdfast.distill", *RUN, "--run-dir", str(run), "--minutes", "0.02"]
    assert "updates for 0.02 minutes" in run_processes(2, *command)
    shutil.rmtree(run / "students/0001")
    updates = yaml.safe_load((run / "config.yaml").read_text())["updates"]
    assert f"rounds {updates}" in run_processes(2, *command)


def test_minutes_or_updates(tmp_path, capsys):
    for flag in ("--updates", "--train.updates", "--kept.count"):
        code = call("distill", *RUN, "--run", str(tmp_path / "run"), "--minutes", "1", flag, "5", "--method", "pairs")
        one_line(capsys, code, 2, "--minutes 1 and", flag, "leave one of them out")
