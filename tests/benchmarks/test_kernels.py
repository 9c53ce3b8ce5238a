"""`python -m benchmarks.kernels` on the CPU."""

import json
import warnings

import pytest
import torch

from benchmarks import kernels
from benchmarks.cases import all_cases
from benchmarks.command import trying
from benchmarks.timing import measure, quantiles
from benchmarks.work import fill, largest_error

CASE = "group_norm small batch 1x192x64 film+silu fp32"


def run(tmp_path, *arguments):
    file = tmp_path / "rows.json"
    assert kernels.main([*arguments, "--device", "cpu", "--seconds", "0.001", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_operation_has_a_row(tmp_path, capsys):
    report = run(tmp_path, "--quick", "--samples", "1", "--providers", "pdfast", "eager")
    header = report["header"]
    assert header["copy_gb_s"] > 0 and header["matmul_tflop_s"] >= header["matmul_bf16_tflop_s"] > 0
    assert {"device", "torch", "triton", "commit", "date"} <= header.keys() and header["pdfast runs"] == "plain PyTorch"
    assert {row["op"] for row in report["rows"]} == {case.op for case in all_cases()}
    for row in report["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["gb_s"] > 0
        assert "fell_back" not in row
        assert (row["error"] is None) == (row["op"] == "diffuse" and row["provider"] == "eager")  # of other noise
        assert row["error"] is None or 0 <= row["error"] < 0.02
        assert row["graph"] is False
    assert "GB/s" in capsys.readouterr().out


def test_backward_and_others(tmp_path):
    arguments = ("--case", CASE, "--mode", "bwd", "full", "--providers", "eager", "apex", "flash")
    rows = run(tmp_path, *arguments)["rows"]
    reasons = {row["provider"]: row.get("unavailable") for row in rows}
    assert reasons == {"eager": None, "apex": "has no FiLM", "flash": "for attention alone"}
    bwd, full = (row for row in rows if row["provider"] == "eager")
    assert bwd["must_move_mb"] < full["must_move_mb"] and 0 < bwd["error"] <= full["error"] < 1e-5


def test_a_wrong_provider_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "call_of", lambda provider, case, work: lambda: 1.01 * work.plain())
    for row in run(tmp_path, "--case", CASE, "--providers", "eager", "--mode", "fwd", "bwd", "full")["rows"]:
        assert row["error"] == pytest.approx(0.01, rel=1e-3)


def test_a_wrong_optimizer_is_seen_and_the_state_stays(monkeypatch):
    [case] = [case for case in all_cases() if case.full_name == "adam_ema any sizes, fp32 gradients"]
    work = case.make(1, "cpu")
    fill(work)
    before = [tensor.clone() for tensor in work.writes]
    assert largest_error(work.kernels, work, "fwd") < 1e-6
    assert largest_error(lambda: None, work, "fwd") > 1e-4
    assert all(torch.equal(now, then) for now, then in zip(work.writes, before, strict=True))
    assert {tensor.dtype for tensor in work.writes} == {torch.float32}


def test_a_provider_that_fails_has_a_row(tmp_path, monkeypatch):
    def failing(provider, case, work):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(kernels, "call_of", failing)
    [row] = run(tmp_path, "--case", CASE, "--providers", "eager")["rows"]
    assert row["unavailable"] == "RuntimeError: no kernel"


def test_a_fallback_is_named():
    row = {}
    with trying(row):
        pass
    assert row == {}
    with trying(row):
        warnings.warn("x runs in PyTorch: y", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert row == {"fell_back": "x runs in PyTorch: y"}


def test_list(capsys):
    assert kernels.main(["--list", "--op", "diffuse"]) == 0
    assert all(line.startswith("diffuse ") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "nothing"], "no such cases; --list names them"),
        (["--op", "nothing"], "argument --op: invalid choice: 'nothing'"),
        (
            ["--shapes", "8,3,32"],
            "argument --shapes: 8,3,32: say cifar10, imagenet64, lsun128, sd15, small-batch or N,C,H,W",
        ),
        (["--shapes", "8,3,32,0"], "argument --shapes: 8,3,32,0: say"),
        (["--shapes", "8,3,32,32", "--op", "attention"], "no such cases"),
        (["--head-dim", "0"], "argument --head-dim: 0 is no whole number of at least 1"),
        (["--seconds", "0"], "argument --seconds: 0 is not more than 0"),
        (["--json", "/nowhere/at/all"], "/nowhere/at/all is no file that could be written"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        kernels.main(arguments)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"benchmarks.kernels: {message}")
    assert printed.err.count("\n") == 1


def listed(capsys, *arguments):
    assert kernels.main(["--list", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_shapes_of_a_network(capsys):
    names = listed(capsys, "--shapes", "lsun128", "small-batch", "--dtype", "bf16")
    assert names and all(" lsun128 " in n or " small batch " in n or n.startswith("adam_ema ") for n in names)
    assert {name.split()[0] for name in names} == {case.op for case in all_cases()}


def test_operations_come_in_the_order_asked_for(capsys):
    names = listed(capsys, "--quick", "--op", "group_norm", "diffuse")
    assert [name.split()[0] for name in names] == ["group_norm"] * 3 + ["diffuse"]


def test_explicit_shapes(capsys, tmp_path):
    names = listed(capsys, "--shapes", "2,96,4,6", "--head-dim", "32", "--dtype", "fp32")
    assert "attention 2x24x3x32 packed fp32" in names and "group_norm 2x96x4x6 film+silu fp32" in names
    assert "attention" not in {name.split()[0] for name in listed(capsys, "--shapes", "2,96,4,6")}
    arguments = "--shapes", "2,96,4,6", "--head-dim", "32", "--dtype", "fp32", "--case", "* 2x*", "--providers", "eager"
    rows = run(tmp_path, *arguments)["rows"]
    assert {row["op"] for row in rows} == {case.op for case in all_cases()} - {"adam_ema"}
    assert all(row["median_ms"] > 0 for row in rows)


def test_all_providers_with_and_without_a_graph(tmp_path):
    arguments = "--shapes", "1,32,4,4", "--case", "group_norm * film+silu fp32", "--providers", "all", "--graph", "both"
    rows = run(tmp_path, *arguments)["rows"]
    assert [(row["provider"], row["graph"]) for row in rows] == [
        (p, g) for p in kernels.PROVIDERS for g in (False, True)
    ]
    for row in rows:
        if row["provider"] in ("pdfast", "eager", "compile"):
            assert row["graph"] == ("median_ms" not in row)
            assert not row["graph"] or row["unavailable"] == "CUDA graphs need a GPU"
        else:
            assert row["unavailable"]


def test_why_no_backend_runs_is_said():
    row = {}
    with trying(row):
        warnings.warn("Flash attention has been runtime disabled. (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")
    assert row == {"unavailable": "Flash attention has been runtime disabled."}


def test_measure():
    times = quantiles(measure(lambda: None, torch.device("cpu"), 0.001))
    assert times["p20_ms"] <= times["median_ms"] <= times["p80_ms"] and times["calls"] >= 3
