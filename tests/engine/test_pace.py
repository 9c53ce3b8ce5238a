"""When a run says that it has become slow, by a clock of the test's."""

import json
import os

import pytest
import torch

from pdfast.engine import pace as pace_module
from pdfast.engine.log import RunLog
from pdfast.engine.pace import Pace, Slowness, likely_cause
from pdfast.engine.world import World

CPU = torch.device("cpu")


class Run:
    """Updates of given seconds."""

    def __init__(self):
        self.now, self.waited, self.said = 1000.0, 0.0, []
        self.pace = Pace(lambda: self.now)
        self.pace.start(0.0)

    def updates(self, seconds, each, wait=0.0):
        """For so many seconds, updates that take `each`, `wait` of it for data."""
        end = self.now + seconds
        while self.now < end:
            self.now += each
            self.waited += wait
            if (slowness := self.pace.update(self.waited)) is not None:
                self.said.append(slowness)
        return self


def test_slow_for_over_a_minute_after_it_was_fast():
    run = Run().updates(30, 0.16).updates(55, 0.8)
    assert run.said == []
    run.updates(30, 0.8, wait=0.2)
    (slowness,) = run.said
    assert slowness.times == pytest.approx(5, rel=0.05) and 0 < slowness.data_wait < 0.25


@pytest.mark.parametrize("each, seconds", [(0.002, 80), (30.0, 31 * 120)])
def test_small_and_large_updates(each, seconds):
    assert len(Run().updates(20 * max(each, 1), each).updates(seconds, 4 * each).said) == 1


@pytest.mark.parametrize(
    "course",
    [
        lambda run: run.updates(600, 0.16),
        lambda run: run.updates(120, 2.0).updates(600, 0.16),  # compiles first
        lambda run: (
            run.updates(60, 0.16).updates(50, 0.8).updates(30, 0.16).updates(50, 0.8).updates(60, 0.16)
        ),  # breaks
        lambda run: run.updates(60, 0.16).updates(300, 0.4),  # a busy neighbour
    ],
)
def test_nothing_is_said_of_what_is_usual(course):
    assert course(Run()).said == []


@pytest.mark.parametrize("long", [20.0, 8 * 3600.0])
def test_a_checkpoint_or_the_sleep_of_a_laptop_is_no_update(long):
    """One long interval in each window."""
    run = Run().updates(60, 0.16)
    for _ in range(20):
        run.updates(0.1, long).updates(10, 0.16)
    assert run.said == []


def test_an_evaluation_between_rounds_is_no_update():
    run = Run()
    for _ in range(8):
        run.updates(25, 0.16)
        run.now += 500
        run.pace.start(run.waited)
    assert run.said == []


def test_the_best_is_remembered_over_rounds():
    run = Run().updates(30, 0.16)
    run.pace.start(run.waited)
    assert len(run.updates(90, 0.8).said) == 1


@pytest.mark.parametrize(
    "environment, slowness, load, threads, words",
    [
        ({}, Slowness(5, 0.8), 9.0, 1, ["80% of the time it waits for images"]),
        ({}, Slowness(5, 0.0), 6.5, 2, ["other processes want the same cores (load average 6.5, 2 cores)"]),
        (
            {"OMP_WAIT_POLICY": "ACTIVE"},
            Slowness(5, 0.0),
            6.5,
            2,
            ["other processes", "OMP_WAIT_POLICY=ACTIVE", "spin"],
        ),
        ({"LOCAL_WORLD_SIZE": "2"}, Slowness(5, 0.0), 6.5, 2, ["4 threads have 2 cores", "OMP_NUM_THREADS"]),
        ({}, Slowness(5, 0.0), 1.0, 2, ["nothing else seems busy here"]),
    ],
)
def test_the_likely_cause(environment, slowness, load, threads, words, monkeypatch):
    for name in (*pace_module.WAITING_POLICIES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cause = likely_cause(slowness, CPU)
    assert all(word in cause for word in words), cause
    assert ("spin" in cause) == ("OMP_WAIT_POLICY" in environment)


def test_a_run_says_it_once(tmp_path, capsys):
    with RunLog(tmp_path, World(CPU)) as log:
        log.warn_of_slowness(Slowness(4.2, 0.9), 8)
        log.warn_of_slowness(Slowness(5.0, 0.9), 4)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pdfast: warning: for a minute an update has taken 4.2 times as long as before: 90%")
    (entry,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert entry["event"] == "warning" and entry["steps"] == 8
