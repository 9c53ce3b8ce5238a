"""`python -m benchmarks.tune`: what it tries, what it rejects, which rows it says. Only a GPU has times."""

import dataclasses
import json
from argparse import Namespace

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import all_cases
from benchmarks.static import launches
from pdfast_kernels.runtime.configs import UNBOUNDED, Blocks, looked_up
from tests.benchmarks.test_static import python

QUICK = [case for case in all_cases() if case.quick]
LOSS = "ddim_step_weighted_loss_and_grad cifar10 128x3x32 P=1 NHWC fp32"


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.full_name)
def test_candidates_are_for_the_launch_and_the_shipped_row_is_first(case):
    with looked_up() as asked:
        launches(lambda: case.make(1, "cpu"), 90)
    for lookup in asked:
        rows = tune.candidates(lookup)
        assert len(rows) > 4 and len(set(rows)) == len(rows)
        assert rows[0][len(lookup.sizes) :] == lookup.row[len(lookup.sizes) :]
        for row in (rows[0], rows[1], rows[-1]):
            with lookup.table.overridden(row):
                assert lookup.table.row(90, *lookup.sizes) == row
                assert launches(lambda: case.make(1, "cpu"), 90)["forward"]


def tried(row, case, **more):
    return {"table": "t", "arch": 90, "sizes": (1,), "row": row, "case": case, "shipped": False, **more}


def test_a_row_replaces_the_shipped_one_if_it_is_faster_over_all_cases():
    shipped = [tried("a", case, shipped=True, median_ms=1.0) for case in ("one", "two")]
    faster_once = [tried("b", "one", median_ms=0.1), tried("b", "two", rejected="spills")]
    slower = [tried("c", "one", median_ms=0.5), tried("c", "two", median_ms=3.0)]
    noise = [tried("d", "one", median_ms=0.99), tried("d", "two", median_ms=0.99)]
    assert tune.replacements([*shipped, *faster_once, *slower, *noise]) == []
    faster = [tried("e", "one", median_ms=0.5), tried("e", "two", median_ms=1.28)]
    assert tune.replacements([*shipped, *slower, *faster]) == ["t, sm_90: e,  # 80% of the shipped row's time"]
    assert tune.replacements([tried("a", "one", shipped=True, rejected="spills"), *faster]) == []


def test_a_row_as_it_stands_in_a_table():
    assert tune.formatted(Blocks(UNBOUNDED, 1024, 4)) == "Blocks(UNBOUNDED, 1024, 4)"
    with looked_up() as asked:
        launches(lambda: next(c for c in QUICK if c.op == "attention").make(1, "cpu"), 90)
    assert "forward_stream" in tune.formatted(asked[0].row)


def test_what_is_rejected_is_not_timed(monkeypatch, capsys):
    """The larger the block, the faster; but those of 8192 elements spill."""

    def read(case, passes, arch):
        [launch] = passes["forward"]
        row = {"kernel": "k", "registers": 32, "stack": 0, "shared": 0}
        return [row | {"failures": ["spills"] if launch.arguments["BLOCK"] == 8192 else []}]

    def timed(case, options, shipped):
        [launch] = launches(lambda: case.make(1, "cpu"), 90)["forward"]
        times.append((launch.arguments["BLOCK"], launch.num_warps))
        return {"error": 0.0, "median_ms": 1 / (launch.arguments["BLOCK"] + launch.num_warps)}

    times = []
    monkeypatch.setattr(tune.static, "read", read)
    monkeypatch.setattr(tune, "_timed", timed)
    monkeypatch.setattr(tune, "_arch", lambda parser, options: 90)
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    assert tune.main(["--case", LOSS]) == 0
    assert len(times) == len(set(times)) == 16 and max(times) == (4096, 16) and times[0] == (1024, 4)
    printed = capsys.readouterr().out.splitlines()
    assert sum("REJECTED: k: spills" in line for line in printed) == 4
    assert printed[-1].startswith("ddim_step_weighted_loss, sm_90: Blocks(3072, 4096, 16),  # 25% of")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels are not interpreted")
def test_timing_one_row(monkeypatch):
    """In the interpreter, which stands in for the GPU."""
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "captured", lambda call: call)
    options = Namespace(seconds=0.001)
    for op in ("ddim_step", "adam_ema"):
        case = dataclasses.replace(next(case for case in QUICK if case.op == op), samples=1)
        shipped = tune._timed(case, options, None)
        assert 0 < shipped["error"] < 1e-6 and 0 < shipped["p20_ms"] <= shipped["median_ms"] <= shipped["p80_ms"]
        assert "rejected" not in tune._timed(case, options, shipped)
        worse = tune._timed(case, options, shipped | {"error": shipped["error"] / 4})
        assert worse["rejected"].startswith("its error is ") and "median_ms" not in worse
    too_much = dataclasses.replace(case, make=lambda samples, device: 1 / 0)
    assert tune._timed(too_much, options, shipped) == {"rejected": "ZeroDivisionError: division by zero"}


def dry_run(folder, *arguments):
    file = folder / "tune.json"
    done = python("benchmarks.tune", "--dry-run", "--json", str(file), *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(file.read_text())


def test_a_dry_run_compiles_every_candidate(tmp_path):
    report = dry_run(tmp_path, "--case", LOSS, "--arch", "80")
    assert report["header"]["arch"] == 80 and report["header"]["commit"] and report["best"] == []
    assert [one["shipped"] for one in report["rows"]] == [True] + [False] * 19
    for one in report["rows"]:
        assert one["registers"] >= 16 and one["arch"] == 80 and "median_ms" not in one
    assert report["rows"][0]["rejected"] is None and report["rows"][0]["row"] == "Blocks(3072, 1024, 4)"
    narrow = next(one for one in report["rows"] if one["row"] == "Blocks(3072, 512, 8)")
    assert narrow["rejected"].startswith("ddim_step_weighted_loss._forward: narrow: ")


def test_only_the_rows_of_a_table_that_were_asked_for(tmp_path):
    case = "attention imagenet64 16x64x12x64 packed bf16"
    rows = ("--rows", "num_warps=4,8", "num_stages=1", "--rows", "block=32", "step=32")
    report = dry_run(tmp_path, "--case", case, "--table", "attention backward", *rows)
    assert [one["row"] for one in report["rows"]] == [
        "Config(64, 64, backward_tile, 64, 64, 4, 1, 0)",
        "Config(64, 64, backward_tile, 64, 64, 8, 1, 0)",
        "Config(64, 64, backward_tile, 32, 32, 4, 1, 0)",
    ]


@pytest.mark.slow
def test_a_row_that_spills_is_rejected(tmp_path):
    report = dry_run(tmp_path, "--case", "adam_ema whole vectors, fp32 gradients")
    spilled = [one for one in report["rows"] if one["stack"]]
    assert spilled and all(one["rejected"].startswith("adam_ema._step: spills: ") for one in spilled)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--quick"], "there is no GPU to time on; --dry-run compiles the candidates without one"),
        (["--quick", "--arch", "90"], "--arch is for --dry-run: what is timed is this machine's GPU"),
        (["--dry-run", "--json", "/nowhere/at/all"], "/nowhere/at/all is no file that could be written"),
        (
            ["--dry-run", "--case", LOSS, "--rows", "block"],
            "argument --rows: block: say FIELD=VALUES, such as block=64,128",
        ),
        (
            ["--dry-run", "--case", LOSS, "--rows", "step=1"],
            "ddim_step_weighted_loss has no field step, but elements, block, ",
        ),
        (["--dry-run", "--case", LOSS, "--table", "t"], "no case asks these tables; asked are ddim_step_weighted_loss"),
        (["--op", "convolution"], "argument --op: invalid choice: 'convolution'"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"benchmarks.tune: {message}")
