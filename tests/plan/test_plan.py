"""The plan's formulas against what a run really keeps and sends; what `--dry-run` prints."""

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdfast.engine import parallelize
from pdfast.engine.cost import inputs
from pdfast.networks import NetworkConfig, UNet
from pdfast.plan import cost
from pdfast.plan.cost import Job
from pdfast.recipes import preset
from tests.commands import TINY_DISTILL, call
from tests.engine.processes import run

SMALL = NetworkConfig(
    image_size=16,
    image_channels=3,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
    head_dim=16,
    emb_channels=64,
    num_groups=8,
    prediction="v",
)


class Alive(TorchDispatchMode):
    """Bytes of all tensors that operations made within it and that are still there."""

    def __init__(self):
        super().__init__()
        self.bytes, self._known = 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage not in self._known:
            self._known.add(storage)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size):
        self.bytes -= size


def kept_by_a_forward(dtype, recomputed, count):
    network = UNet(SMALL)
    network.dtype = dtype
    if recomputed:
        parallelize.checkpoint_activations(network)
    given = inputs(SMALL, count, "cpu")
    with Alive() as alive:
        output = network(*given)
        kept = alive.bytes - output.nbytes
    assert output.requires_grad
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_forward_keeps(dtype):
    counted = cost.kept(SMALL, dtype)
    for count in (2, 5):
        expected = counted.an_image * count + counted.whatever_the_batch
        assert kept_by_a_forward(dtype, False, count) == pytest.approx(expected, rel=0.02)


def test_recomputed_activations():
    """After a forward with checkpoints only the blocks' inputs are there; the formula adds what the largest block keeps."""
    whole, recomputed = (cost.activation_bytes(SMALL, recomputed=again) for again in (False, True))
    inputs = (kept_by_a_forward(torch.float32, True, 5) - kept_by_a_forward(torch.float32, True, 2)) / 3
    assert 0 < recomputed - inputs < whole / 4 and recomputed < whole / 2


def test_the_fused_operations_keep_less():
    for dtype in (torch.float32, torch.bfloat16):
        assert cost.activation_bytes(SMALL, dtype, fused=True) < 0.7 * cost.activation_bytes(SMALL, dtype)


CASES = {
    "1,float32,1,auto": Job(preset("digits").network, torch.float32, 16, processes=4, shards=1),
    "2,float32,2,on": Job(
        preset("digits").network, torch.float32, 16, processes=4, shards=2, micro_batches=2, teacher_sharded=True
    ),
    "4,bfloat16,1,on": Job(
        preset("digits").network, torch.bfloat16, 16, processes=4, shards=4, teacher_sharded=True
    ),
}  # fmt: skip


@pytest.mark.slow
def test_what_four_processes_keep_and_send():
    """Replicas, hierarchical with micro-batches, all in parts with bf16: bytes counted at the collectives of one update."""
    text = run(4, "-m", "tests.plan.sent", *CASES)
    counted = {row.pop("case"): row for line in text.splitlines() if line.startswith("{") for row in [json.loads(line)]}
    assert counted.keys() == CASES.keys()
    assert counted["1,float32,1,auto"]["collectives"] == 1, "replicas exchange one buffer"
    for name, row in counted.items():
        job = replace(CASES[name], average=True)
        for collective, sent in cost.communication(job).items():
            assert sent == pytest.approx(row[collective], rel=0.01, abs=100), (name, collective)  # 100: norm and flags
        memory = cost.memory(job)
        state = memory["weights"] + memory["Adam"] + memory["average"]
        assert state == pytest.approx(row["state"], rel=0.01), name
        assert memory["teacher"] == pytest.approx(row["teacher"], rel=0.01), name


def tables(text):
    """The numbers of the plan's tables by row, one a stage."""
    return {m[1].strip(): m[2].replace(",", "").split() for m in re.finditer(r"^  (\S.*?)  +([-\d., ]+)$", text, re.M)}


def plan(capsys, *flags, command="distill"):
    assert call(command, *flags, "--dry-run") == 0
    return capsys.readouterr().out


def test_the_plan_says_what_the_formulas_say(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = ["--device", "cpu", "--engine.shard", "4", "--engine.micro-batches", "2", "--ema", "0.9"]
    flags += ["--method", "progressive", "--batch-size", "128"]
    text = plan(capsys, *flags)
    assert "8 processes, 2 copies of the network in 4 parts; float32, micro-batches of 8 images" in text
    job = Job(preset("digits").network, torch.float32, 128, processes=8, shards=4, micro_batches=2, average=True)
    rows = tables(text)
    expected = cost.memory(job)
    for name, size in (expected | {"in all": sum(expected.values())} | cost.communication(job)).items():
        assert float(rows[name][1]) == pytest.approx(size / 1e6, abs=0.05), name
    assert rows["teacher"][0] == "-"
    sent = sum(cost.communication(job).values())
    assert float(rows["ms at 50 GB/s (400 Gbit/s)"][1]) == pytest.approx(sent / 50e9 * 1e3, abs=0.05)


def test_one_process_sends_nothing(capsys, monkeypatch):
    text = plan(capsys, "--device", "cpu")
    assert "sent by a process" not in text and "buffers" not in tables(text)
    monkeypatch.setenv("RANK", "1")
    assert plan(capsys, "--device", "cpu") == "", "under torchrun the first process prints the plan"


def test_a_plan_for_a_teacher(capsys):
    rows = tables(plan(capsys, "--device", "cpu", "--engine.recompute", command="train"))
    assert len(rows["weights"]) == 1 and float(rows["Adam"][0]) == pytest.approx(2 * 4 * 195505 / 1e6, abs=0.05)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--engine.shard", "3"], "--engine.shard 3 must divide the number of processes, 4"),
        (["--engine.micro-batches", "3"], "a batch of 16 does not divide by 4 processes times 3 micro-batches"),
    ],
)
def test_a_plan_that_cannot_be(flags, reason, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert call("distill", *TINY_DISTILL, *flags, "--dry-run") == 2
    assert reason in capsys.readouterr().err
