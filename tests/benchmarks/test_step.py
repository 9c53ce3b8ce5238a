"""`python -m benchmarks.step` and `.first` on the CPU, with a network that trains in milliseconds."""

import gzip
import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import first, ours, rivals, step, timing, updates
from pdfast.recipes import PRESETS


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The presets, but small."""
    network = replace(
        PRESETS["digits"].network, channels=8, channel_mult=(1,), head_dim=8, emb_channels=32, num_groups=4
    )
    both = replace(network, prediction="both", num_classes=3, attention_resolutions=(8,), image_channels=3)
    for name, shape in {"digits": network, "imagenet64": both}.items():
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], network=shape, batch_size=4))
    monkeypatch.setitem(timing.CEILING_SIZE, "cpu", 32)
    monkeypatch.setattr("pdfast.engine.machine.peak_flops", lambda *_: 1e10)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)


def run(tmp_path, *arguments):
    file = tmp_path / "rows.json"
    assert step.main([*arguments, "--device", "cpu", "--seconds", "0.05", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_rows(tmp_path, capsys):
    report = run(tmp_path, "--sampling")
    header, rows = report["header"], report["rows"]
    assert {"device", "torch", "commit", "date", "matmul_tflop_s"} <= header.keys()
    assert [row["provider"] for row in rows] == ["eager", "pdfast", "compile", "diffusers", "diffusers"]
    for row in rows[:3]:
        assert row["error"] < 1e-4 and (row["preset"], row["batch"], row["dtype"]) == ("digits", 4, "fp32")
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["calls"] >= 5
        assert row["images_per_second"] == pytest.approx(4000 / row["median_ms"])
        assert row["mfu"] == pytest.approx(row["tflop_s"] / header["matmul_tflop_s"]) and row["mfu"] > 0
        assert 4 * 4 * row["parameters"] < row["peak_mib"] * 2**20  # two networks and Adam's moments
        assert list(row["breakdown_ms"]) == ["teacher", "student", "rest"]
        assert row["sampled_images_per_second"].keys() == {"1", "4"}
    for row in rows[3:]:
        assert row["unavailable"].startswith("diffusers is not installed (")
    printed = capsys.readouterr().out
    assert "unavailable: diffusers" in printed


def test_other_networks_and_the_breakdown(tmp_path):
    """Classes, both outputs, attention and flips; the networks make up most of the update, measured at another time."""
    rows = run(tmp_path, "--preset", "imagenet64", "digits", "--providers", "pdfast", "eager")["rows"]
    assert [row["preset"] for row in rows] == ["imagenet64"] * 2 + ["digits"] * 2
    assert all(row["error"] < 1e-4 for row in rows)
    networks = [sum(list(row["breakdown_ms"].values())[:2]) / row["median_ms"] for row in rows]
    assert 0.2 < torch.tensor(networks).median() < 1.2


def test_peak_memory():
    kept = torch.zeros(1 << 18)

    def call():
        for _ in range(3):
            torch.zeros(1 << 18) + 1

    assert timing.peak_mib(call, torch.device("cpu"), [kept, kept.view(2, -1)]) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("provider", ["pdfast", "eager"])
def test_a_wrong_provider_is_seen(tmp_path, monkeypatch, provider):
    if provider == "pdfast":
        monkeypatch.setattr("pdfast.loss.ddim_step", lambda z, *others: 1.01 * z)
    else:
        published = rivals.distillation_losses

        def wrong(teacher, student, batch, *others):
            return published(teacher, student, batch._replace(x=1.1 * batch.x), *others)

        monkeypatch.setattr(rivals, "distillation_losses", wrong)
    [row] = run(tmp_path, "--providers", provider)["rows"]
    assert row["error"] > 1e-3


def test_every_update_learns():
    """The weights move by about the learning rate, as Adam's do."""
    with updates.open_setting(PRESETS["digits"], torch.device("cpu"), 4, step.EngineConfig()) as (setting, machine):
        for update in (
            ours.Pdfast(setting, machine("off")),
            rivals.eager(setting),
            rivals.compiled(setting, "default"),
        ):
            parameters = [tensor.detach() for tensor in update.tensors()]
            before = [tensor.clone() for tensor in parameters]
            update.step()
            moved = max(float((now - then).abs().max()) for now, then in zip(parameters, before, strict=True))
            assert moved >= 0.9 * setting.config.learning_rate


def test_rivals_run_as_pytorch_comes_and_not_as_a_run_of_ours(monkeypatch):
    cudnn, seen = torch.backends.cudnn, []
    losses = rivals.distillation_losses

    def watched(*arguments):
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))
        return losses(*arguments)

    monkeypatch.setattr(rivals, "distillation_losses", watched)
    with updates.open_setting(PRESETS["digits"], torch.device("cpu"), 4, step.EngineConfig()) as (setting, _):
        ours = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
        assert ours == (False, True, False)
        for rival in (rivals.eager(setting), rivals.compiled(setting, "default")):
            rival.step()
            assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == ours
    assert seen == [(False, False, True), (True, False, True)]


def test_a_provider_that_fails_has_a_row(tmp_path, monkeypatch):
    def failing(setting):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(rivals, "eager", failing)
    [row] = run(tmp_path, "--providers", "eager")["rows"]
    assert row["unavailable"] == "RuntimeError: no kernel"


def test_memory_that_lacks_halves_the_batch(tmp_path, monkeypatch):
    eager = rivals.eager

    def limited(setting):
        if setting.config.batch_size > 2:
            raise torch.cuda.OutOfMemoryError
        return eager(setting)

    monkeypatch.setattr(rivals, "eager", limited)
    rows = run(tmp_path, "--providers", "eager", "--batch", "8", "--halve")["rows"]
    said = {row["batch"]: row.get("unavailable") for row in rows}
    assert said == {8: "out of memory at batch 8", 4: "out of memory at batch 4", 2: None}
    [row] = run(tmp_path, "--providers", "eager", "--batch", "8")["rows"]
    assert row["unavailable"] == "out of memory at batch 8"


def test_variants_of_pdfast(tmp_path):
    rows = run(tmp_path, *"--providers pdfast --compile off on --dtype bf16".split())["rows"]
    assert [row["variant"] for row in rows] == ["compile off", "compile on"]
    assert all(row["dtype"] == "bf16" and 1e-6 < row["error"] < 0.1 for row in rows)


def test_first_things_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first, "ENDS", {"digits": 2, "imagenet64": 2})
    file = tmp_path / "first.json"
    flags = f"--device cpu --preset digits --batch 4 --seconds 0.01 --json {file}"
    assert first.main(flags.split()) == 0
    report = json.loads(file.read_text())
    assert report["header"]["numpy"] == np.__version__ and report["header"]["pytest"]
    kinds = [(row["end"], row["of"]) for row in report["rows"] if row["network"] == "digits" and row["tf32"] == "on"]
    of_in, of_out = (["forward", "weight gradient"], ["forward", "input gradient", "weight gradient"])
    assert kinds == [*[("conv_in", of) for of in of_in], *[("conv_out", of) for of in of_out]]
    assert len(report["rows"]) == 20 and all(row["ms"] > 0 for row in report["rows"])
    assert report["update"]["median_ms"] > 0 and report["update"]["kernels"][0]["ms"] > 0
    assert json.load(gzip.open(tmp_path / "first.trace.json.gz"))["traceEvents"]
    assert "ms an update" in capsys.readouterr().out


def test_list(capsys):
    assert step.main(["--list", "--device", "cpu", "--modes", "default", "reduce-overhead"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[:4] == ["eager", "pdfast compile auto", "compile default", "compile reduce-overhead"]


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (step, ["--batch", "0"], "argument --batch: 0 is no whole number of at least 1"),
        (step, ["--seconds", "0"], "argument --seconds: 0 is not more than 0"),
        (step, ["--preset", "nothing"], "argument --preset: invalid choice: 'nothing'"),
        (step, ["--json", "/nowhere/at/all"], "/nowhere/at/all is no file that could be written"),
        (first, ["--json", "/nowhere/at/all"], "/nowhere/at/all is no file that could be written"),
    ],
)
def test_bad_arguments_are_one_line(capsys, command, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, "--device", "cpu"])
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
