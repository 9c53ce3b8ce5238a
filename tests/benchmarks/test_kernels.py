"""`python -m benchmarks.kernels` on the CPU."""

import csv
import json
import warnings

import pytest
import torch

from benchmarks import kernels, providers
from benchmarks.cases import all_cases
from benchmarks.timing import measure

CASE = "group_norm small batch 1x192x64 film+silu fp32"


def run(tmp_path, *arguments):
    file = tmp_path / "rows.json"
    assert kernels.main([*arguments, "--device", "cpu", "--seconds", "0.001", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_operation_has_a_row(tmp_path, capsys):
    arguments = ("--quick", "--samples", "1", "--providers", "pdfast", "eager", "--csv", str(tmp_path / "rows.csv"))
    report = run(tmp_path, *arguments)
    assert report["header"]["copy_gb_s"] > 0 and report["header"]["matmul_bf16_tflop_s"] > 0
    assert {row["op"] for row in report["rows"]} == {case.op for case in all_cases()}
    for row in report["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["gb_s"] > 0
        assert row["fell_back"] is None
        if row["op"] not in kernels.RANDOM_NOISE:
            assert 0 <= row["error"] < 0.02
    assert len(list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))) == len(report["rows"])
    assert "GB/s" in capsys.readouterr().out


def test_backward_and_others(tmp_path):
    arguments = ("--case", CASE, "--mode", "bwd", "full", "--providers", "eager", "apex", "flash")
    rows = run(tmp_path, *arguments)["rows"]
    reasons = {row["provider"]: row.get("unavailable") for row in rows}
    assert reasons == {"eager": None, "apex": "has no FiLM", "flash": "for attention alone"}
    bwd, full = (row for row in rows if row["provider"] == "eager")
    assert bwd["must_move_mb"] < full["must_move_mb"]


def test_a_wrong_provider_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "call_of", lambda provider, case, work: lambda: 1.01 * work.plain())
    [row] = run(tmp_path, "--case", CASE, "--providers", "eager")["rows"]
    assert row["error"] == pytest.approx(0.01, rel=1e-3)


def test_a_provider_that_fails_has_a_row(tmp_path, monkeypatch):
    def failing(provider, case, work):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(kernels, "call_of", failing)
    [row] = run(tmp_path, "--case", CASE, "--providers", "eager")["rows"]
    assert row["unavailable"] == "RuntimeError: no kernel"


def test_a_fallback_is_named():
    assert providers.fallback(lambda: None) is None
    assert providers.fallback(lambda: warnings.warn("x runs in PyTorch: y", stacklevel=1)) == "x runs in PyTorch: y"


def test_list_and_bad_arguments(capsys):
    assert kernels.main(["--list", "--op", "diffuse"]) == 0
    assert all(line.startswith("diffuse ") for line in capsys.readouterr().out.splitlines())
    assert kernels.main(["--case", "nothing"]) == 2
    assert capsys.readouterr().err == "benchmarks.kernels: error: no such cases; --list names them\n"
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--op", "nothing"])


def test_measure():
    timing = measure(lambda: None, torch.device("cpu"), 0.001)
    assert timing.p20 <= timing.median <= timing.p80 and timing.calls >= 5
