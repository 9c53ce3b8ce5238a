"""Compiled runs: nothing is compiled again once everything ran; the same course as without."""

import json
import warnings

import pytest
import torch

import pdfast.distill
from pdfast.engine.graph import CUDAGraphed
from pdfast.engine.machine import Machine
from pdfast.engine.parallelize import compiled_graphs
from pdfast.engine.world import World
from tests.commands import TINY_GIVEN, call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's, about itself
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in blocks"])
def test_three_rounds_and_their_evaluations_compile_once(finished_run, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(Machine, "_in_one_graph", whole)
    counts = []
    original = pdfast.distill.write_student

    def counted(*arguments):
        counts.append(compiled_graphs())
        original(*arguments)
        counts.append(compiled_graphs())

    monkeypatch.setattr(pdfast.distill, "write_student", counted)
    flags = [
        *TINY_GIVEN,
        "--teacher",
        str(finished_run / "teacher"),
        "--rounds",
        "3",
        "--updates",
        "4",
        "--batch-size",
        "16",
    ]
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    assert call("distill", *flags, "--run", str(plain)) == 0
    counts.clear()
    assert call("distill", *flags, "--run", str(compiled), "--engine.compile", "on") == 0
    trained, evaluated, *later = counts
    assert 0 < trained < evaluated and later == [evaluated] * 4
    ours, theirs = ([json.loads(line) for line in (run / "log.jsonl").open()] for run in (compiled, plain))
    for one, other in zip(ours, theirs, strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)


def test_a_cpu_runs_plainly_and_says_nothing():
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replayed = CUDAGraphed(lambda: calls.append(1), World(torch.device("cpu")))
        for _ in range(5):
            replayed()
    assert len(calls) == 5


def test_several_processes_on_gpus_say_why_there_is_no_graph():
    with pytest.warns(UserWarning, match="without a CUDA graph: its collectives are of several processes"):
        CUDAGraphed(lambda: None, World(torch.device("cuda"), size=2))
