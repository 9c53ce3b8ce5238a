"""`python -m benchmarks.step` and `.first` on the CPU, with a network that trains in milliseconds."""

import gzip
import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import first, step, timing, updates
from pdfast.diffusion import noise
from pdfast.diffusion.noise import Stream
from pdfast.networks import UNet
from pdfast.recipes import PRESETS
from pdfast_kernels.runtime import dispatch


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
        assert (row["preset"], row["batch"], row["dtype"]) == ("digits", 4, "fp32")
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
    networks = [sum(list(row["breakdown_ms"].values())[:2]) / row["median_ms"] for row in rows]
    assert 0.2 < torch.tensor(networks).median() < 1.2


def test_peak_memory():
    kept = torch.zeros(1 << 18)

    def call():
        for _ in range(3):
            torch.zeros(1 << 18) + 1

    assert timing.peak_mib(call, torch.device("cpu"), [kept, kept.view(2, -1)]) == pytest.approx(3, abs=0.1)


def opened(preset="digits", dtype="fp32"):
    return updates.open_setting(PRESETS[preset], torch.device("cpu"), 4, step.EngineConfig(dtype=dtype))


def of_ours(setting):
    """The losses of pdfast's first update, and what it was about, by the formulas of its random numbers."""
    update, seen = updates.Pdfast(setting, "off"), []
    add = update.trainer.losses.add
    update.trainer.losses.add = lambda losses, *row: (seen.append(losses.clone()), add(losses, *row))
    update.step()
    batch, config = update.trainer.batch, setting.config
    x = batch.x.permute(0, 3, 1, 2).double() / 127.5 - 1
    if config.flip:
        flip = noise.integer(batch.key(Stream.FLIP), batch.index, 2).bool()
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    eps = noise.normal(batch.key(Stream.NOISE), batch.index, config.network.image_shape)
    k = batch.step_indices(update.method.table.count)
    return seen[0], updates.Batch(x, eps, k, batch.cond)


def of_a_rival(setting, mode):
    """The same of a rival's."""
    rival, published, seen = updates.Rival(setting, mode), updates.distillation_losses, []

    def watched(teacher, student, batch, *others):
        seen.append((published(teacher, student, batch, *others), batch))
        return seen[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "distillation_losses", watched)
        rival.step()
    return seen[0][0].detach(), seen[0][1]


def error(losses, batch, setting):
    """From the published update in float64, of plain PyTorch: the largest difference, of the largest loss."""
    networks = []
    for weights in setting.weights:
        model = UNet(setting.config.network)
        model.load_state_dict(weights)
        model.to(setting.device).dtype = torch.float64
        for block in model.blocks():
            block.double()
        networks.append(dispatch.use("reference")(model.forward))
    with torch.no_grad():
        expected = updates.distillation_losses(*networks, batch, setting.config, torch.float64)
    return float((losses.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("preset", ["digits", "imagenet64"])
def test_all_compute_what_is_published(preset):
    """With classes, both outputs, attention and flips too."""
    with opened(preset) as setting:
        assert error(*of_ours(setting), setting) < 1e-4
        assert error(*of_a_rival(setting, None), setting) < 1e-4
        assert error(*of_a_rival(setting, "default"), setting) < 1e-4


def test_bf16_is_near_and_another_update_is_seen(monkeypatch):
    with opened(dtype="bf16") as setting:
        assert 1e-6 < error(*of_ours(setting), setting) < 0.1
    with opened() as setting:
        losses, batch = of_a_rival(setting, None)
        assert error(losses, batch._replace(x=1.1 * batch.x), setting) > 1e-3
        monkeypatch.setattr("pdfast.loss.ddim_step", lambda z, *others: 1.01 * z)
        assert error(*of_ours(setting), setting) > 1e-3


def test_every_update_learns():
    """The weights move by about the learning rate, as Adam's do."""
    with opened() as setting:
        for update in (updates.Pdfast(setting, "off"), updates.Rival(setting, None), updates.Rival(setting, "default")):
            parameters = [tensor.detach() for tensor in update.tensors()]
            before = [tensor.clone() for tensor in parameters]
            update.step()
            moved = max(float((now - then).abs().max()) for now, then in zip(parameters, before, strict=True))
            assert moved >= 0.9 * setting.config.learning_rate


def test_rivals_run_as_pytorch_comes_and_not_as_a_run_of_ours(monkeypatch):
    cudnn, seen = torch.backends.cudnn, []
    losses = updates.distillation_losses

    def watched(*arguments):
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))
        return losses(*arguments)

    monkeypatch.setattr(updates, "distillation_losses", watched)
    with opened() as setting:
        ours = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
        assert ours == (False, True, False)
        for mode in (None, "default"):
            updates.Rival(setting, mode).step()
            assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == ours
    assert seen == [(False, False, True), (True, False, True)]


def test_a_provider_that_fails_has_a_row(tmp_path, monkeypatch):
    def failing(setting, mode):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(step, "Rival", failing)
    [row] = run(tmp_path, "--providers", "eager")["rows"]
    assert row["unavailable"] == "RuntimeError: no kernel"


def test_memory_that_lacks_halves_the_batch(tmp_path, monkeypatch):
    def limited(setting, mode):
        if setting.config.batch_size > 2:
            raise torch.cuda.OutOfMemoryError
        return updates.Rival(setting, mode)

    monkeypatch.setattr(step, "Rival", limited)
    rows = run(tmp_path, "--providers", "eager", "--batch", "8", "--halve")["rows"]
    said = {row["batch"]: row.get("unavailable") for row in rows}
    assert said == {8: "out of memory", 4: "out of memory", 2: None}
    [row] = run(tmp_path, "--providers", "eager", "--batch", "8")["rows"]
    assert row["unavailable"] == "out of memory"


def test_variants_of_pdfast(tmp_path):
    rows = run(tmp_path, *"--providers pdfast --compile off on --dtype bf16".split())["rows"]
    assert [row["variant"] for row in rows] == ["compile off", "compile on"]
    assert all(row["dtype"] == "bf16" and row["median_ms"] > 0 for row in rows)


def test_first_things_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first, "ENDS", {"digits": 2, "imagenet64": 2})
    file = tmp_path / "first.json"
    flags = f"--device cpu --preset digits --batch 4 --seconds 0.01 --json {file}"
    assert first.main(flags.split()) == 0
    report = json.loads(file.read_text())
    assert report["installed"]["numpy"] == np.__version__ and report["installed"]["pytest"]
    kinds = [
        (row["end"], row["of"]) for row in report["rows"] if row["network"] == "digits" and row["by"] == "products"
    ]
    of_in, of_out = (["forward", "weight gradient"], ["forward", "input gradient", "weight gradient"])
    assert kinds == [*[("conv_in", of) for of in of_in], *[("conv_out", of) for of in of_out]]
    assert len(report["rows"]) == 30 and all(row["ms"] > 0 for row in report["rows"])
    assert report["update"]["median_ms"] > 0 and report["update"]["kernels"][0]["ms"] > 0
    assert sum(report["update"]["kinds"].values()) == pytest.approx(report["update"]["kernels_ms"])
    assert json.load(gzip.open(tmp_path / "first.trace.json.gz"))["traceEvents"]
    assert "ms an update" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("group_norm_apply", "group_norm"),
        ("triton_poi_fused_convolution_group_norm_permute_split_0", "compiled by Inductor"),
        ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32", "convolutions"),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_bias_TNN", "matrix products"),
        ("attention_forward_stream", "attention"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<at::native::", "copies"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16", "rest of PyTorch"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert first.kind_of(kernel) == kind


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
