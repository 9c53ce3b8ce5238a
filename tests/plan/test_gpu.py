"""What a GPU is predicted to take: the operations against another count, the constants against what was measured, and what `--dry-run` says."""

import json
from dataclasses import replace

import pytest
import torch

from pdfast.arguments import train_arguments
from pdfast.engine.cost import UpdateCost, parameters_and_flops
from pdfast.networks.converted import ConvertedConfig
from pdfast.plan import gpu
from pdfast.plan.cost import Job
from pdfast.plan.dry_run import print_training_plan
from pdfast.plan.gpu import GPUS, Kernel, kernels, seconds_of_forward, seconds_of_update
from pdfast.recipes import PRESETS
from tests.commands import ROOT, TINY_NETWORK, call, one_line

H200, NORM = GPUS["h200"], "group_norm"
RESULTS = ROOT / "benchmarks" / "results" / "h200"
BF16 = torch.bfloat16
JOB = Job(PRESETS["cifar10"].network, BF16, 128)


def total(job, of=H200):
    return sum(seconds_of_update(of, job).values())


def flops_of(listed):
    return sum(kernel.flops for kernel in listed)


@pytest.mark.parametrize("preset", ["digits", "cifar10", "imagenet64"])
def test_operations_are_those_of_another_count(preset):
    """The backward makes twice those of the forward, but for the gradient of the images, and attention's scores again."""
    network = PRESETS[preset].network
    forward, backward = kernels(network, BF16, 128, 90)
    assert flops_of(forward) == 128 * parameters_and_flops(network)[1]
    again = flops_of(kernel for kernel in forward if kernel.kind == "attention") / 2
    conv_in = 2 * 128 * 9 * network.image_channels * network.channels * network.image_size**2
    assert flops_of(backward) == pytest.approx(2 * flops_of(forward) + again - conv_in, rel=1e-3)


def test_groups_that_fit_on_chip_are_read_once():
    """cifar10's do, but for 16 channels of 32 x 32 in the backward; imagenet64's are streamed from 32 x 32 on."""
    streamed = [[k for k in of if k.kind.endswith("streamed")] for of in kernels(JOB.network, BF16, 128, 90)]
    assert [len(of) for of in streamed] == [0, 4]
    assert {k.bytes for k in streamed[1]} == {5 * 2 * 128 * 512 * 32**2}


def test_bytes_that_a_block_moves():
    """Of the digits' first: a bias and a residual sum are passes, and weights are cast; a norm is a kernel of its own."""
    forward, _ = kernels(PRESETS["digits"].network, BF16, 4, 90)
    fused = next(kernel for kernel in forward if kernel.kind == "compiled by Inductor")
    image, weights = 2 * 4 * 16 * 8**2, 2 * 16 * (9 * 16 + 1) + 2 * 16 * (64 + 1)
    assert fused.bytes == 5 * image + 6 * weights  # a bias: read, write; a sum: read two, write


@pytest.mark.parametrize(
    "case, listed",
    [
        ("group_norm imagenet64 16x384x64", lambda x: [Kernel(f"{NORM}, streamed", 0, p * x) for p in (3, 5)]),
        ("group_norm cifar10 128x256x32", lambda x: [Kernel(NORM, 0, passes * x) for passes in (2, 3)]),
        ("attention imagenet64 16x1024x6x64", lambda x: [Kernel("attention", f * 512 * x, b * x) for f, b in BOTH]),
        ("attention imagenet64 16x256x9x64", lambda x: [Kernel("attention", f * 128 * x, b * x) for f, b in BOTH]),
        ("attention cifar10 128x256x1x256", lambda x: [Kernel("attention", f * 128 * x, b * x) for f, b in BOTH]),
    ],
)
def test_norms_and_attention_take_what_was_measured(case, listed):
    """Forward and backward of 128 samples, with the fastest of the launch configurations that are shipped or were tried."""
    rows = json.loads((RESULTS / "tune.json").read_text())["rows"]
    measured = min(row["median_ms"] for row in rows if row["case"].startswith(case)) / 1e3
    op, *_, shape = case.split()
    _, *sizes = map(int, shape.split("x"))
    elements = 128 * sizes[0] * sizes[1] * sizes[-1]  # [channels, size, size], or [positions, heads, head_dim]
    predicted = sum(kernel.seconds(H200) for kernel in listed(2 * elements))
    assert predicted == pytest.approx(measured, rel=0.2), op


BOTH = ((4, 4), (10, 9))


@pytest.mark.parametrize("preset, images", [("cifar10", 128), ("imagenet64", 256)])
def test_ends_take_what_was_measured(preset, images):
    rows = json.loads((RESULTS / "first.json").read_text())["rows"]
    ms = {(r["end"], r["of"]): r["ms"] for r in rows if (r["network"], r["by"]) == (preset, "products")}
    ms["conv_out", "weight gradient"] = 0  # that row, and the input's, computed both
    measured = sum(time * (3 if of == "forward" else 1) for (_, of), time in ms.items()) * 128 / images
    predicted = 1e3 * seconds_of_update(H200, replace(JOB, network=PRESETS[preset].network))["ends"]
    assert predicted == pytest.approx(measured, rel=0.1)


def test_what_an_update_is_made_of():
    update = seconds_of_update(H200, JOB)
    half = total(replace(JOB, micro_batches=2, batch_size=256)) - 2 * total(JOB)
    assert half == pytest.approx(-(1 + gpu.BETWEEN) * update["optimizer"])
    forward = 128 * seconds_of_forward(H200, JOB)
    assert total(replace(JOB, recompute=True)) - total(JOB) == pytest.approx(forward)
    assert total(JOB) - total(replace(JOB, cost=UpdateCost(teacher_forwards=0))) == pytest.approx(2 * forward)
    assert total(replace(JOB, processes=8, batch_size=1024)) == total(JOB)
    assert total(replace(JOB, average=True)) > total(JOB) > total(replace(JOB, processes=4, shards=4, batch_size=512))


def test_other_gpus_differ_by_what_their_makers_state():
    times = {name: total(JOB, of) for name, of in GPUS.items()}
    assert times["b200"] < times["h200"] < times["h100"] < times["a100"]
    one, other = (seconds_of_update(GPUS[name], JOB) for name in ("h200", "h100"))
    assert one["convolutions"] == other["convolutions"]
    assert one["optimizer"] == pytest.approx(other["optimizer"] * 3.35 / 4.8, rel=0.01)


def test_a_network_that_is_not_counted_by_kind(capsys, monkeypatch):
    inner = replace(PRESETS["digits"].network, prediction="eps")
    job = Job(ConvertedConfig(inner), BF16, 64)
    flops = 5 * 64 * parameters_and_flops(inner)[1]
    assert seconds_of_update(H200, job) == {"all kinds": pytest.approx(flops / gpu.OF_PEAK / 989e12)}
    monkeypatch.setattr("sys.argv", ["pdfast.train", "--device", "cpu", "--dry-run", "--gpu", "h200"])
    config, extra = train_arguments()
    print_training_plan(replace(config, network=job.network), torch.device("cpu"), extra.gpu)
    (device,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("device"))
    assert "an H200: 2.33e-05 ms a forward and image (386 TFLOP/s), predicted" in device
    assert "at 39% of the peak, since of this network operations alone are counted; fitted to one H200's" in device


def plan(capsys, *flags, command="distill"):
    assert call(command, "--device", "cpu", *flags, "--dry-run") == 0
    return capsys.readouterr().out


def test_a_plan_for_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("pdfast.plan.dry_run.seconds_a_forward", None)  # nothing is measured here
    text = plan(capsys, "--gpu", "h100", "--method", "progressive", "--ema", "0", "--updates", "36000")
    job = Job(PRESETS["digits"].network, BF16, 64)
    update = total(job, GPUS["h100"])
    assert (
        "predicted and not measured: from counted operations and bytes, at rates that were fitted to one H200's" in text
    )
    assert "; bfloat16, micro-batches of 64 images" in text
    lines = {line[:32].strip(): line.split() for line in text.splitlines()}
    assert lines["predicted for an H100, ms/update"][-2:] == ["teacher", "rounds"]
    assert float(lines["in all"][-1]) == pytest.approx(1e3 * update, abs=0.051)
    (of_round,) = (line.split()[-1] for line in text.splitlines() if line.startswith("128 steps"))
    minutes, seconds = map(int, of_round.split(":"))
    assert 60 * minutes + seconds == pytest.approx(36000 * update, abs=1)
    last = text.splitlines()[-1]
    assert last.startswith("expected time") and ", predicted for an H100 (training" in last


def test_a_plan_for_several_gpus_and_for_a_teacher(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = plan(capsys, "--gpu", "a100", *TINY_NETWORK, command="train")
    assert "communication is not in its times" in text and "expected time" in text.splitlines()[-1]
    assert ", predicted for an A100, and the evaluation of" in text.splitlines()[-1]


@pytest.mark.parametrize("command", ["distill", "train"])
def test_refusals(command, capsys):
    one_line(capsys, call(command, "--gpu", "v100", "--dry-run"), 2, "v100", "--gpu", "h200", "b200")
    one_line(capsys, call(command, "--gpu", "h100"), 2, "--gpu h100 is for --dry-run: add that, or leave --gpu out")
    flags = ["--device", "cpu", "--gpu", "h100", "--dry-run", "--engine.dtype", "fp32"]
    one_line(
        capsys, call(command, *flags), 2, "--gpu h100 predicts updates in bf16 alone: leave out --engine.dtype fp32"
    )
