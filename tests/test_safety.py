"""What checkpoints and logging cost a run, as shares of its training time: at most 2 % and 1 %."""

import json
import time
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.log import Progress
from pdfast.evaluation.inception import InceptionV3
from pdfast.recipes import PRESETS
from tests.commands import TINY_NETWORK, call

MOST = {"checkpoints": 0.02, "logging": 0.01}
COUNTED = [
    *[("checkpoints", Checkpoints, function, time.perf_counter) for function in ("save", "poll", "finish")],
    ("writer", Checkpoints, "_write", time.thread_time),
    ("logging", Progress, "update", time.perf_counter),
]


class Spent:
    """Seconds in functions that a training loop calls, and how often it did."""

    def __init__(self, device):
        self.seconds, self.calls = Counter(), Counter()
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(self, name, owner, function, clock):
        """A patch of the function. What it would wait for on the device is waited for before, and is not its cost."""
        original = getattr(owner, function)

        def run(*arguments, **options):
            self._wait()
            began, before = clock(), self.seconds[name]
            try:
                return original(*arguments, **options)
            finally:
                self.seconds[name] = before + clock() - began  # once, where one of them calls another
                self.calls[name] += 1

        return mock.patch.object(owner, function, run)


def shares(folder, preset, device, updates, *flags):
    """Of a short run of one round, from random weights, past its first quarter, in which it compiles. Both are at the preset's
    own intervals: a run too short for two checkpoints saves more often, and their share is taken down to that interval."""
    every, spent = min(preset.checkpoint_every, updates // 2), Spent(device)
    with ExitStack() as patches:
        for what in COUNTED:
            patches.enter_context(spent.timed(*what))
        command = f"--preset {preset.preset} --method progressive --rounds 1 --updates {updates} --device {device} --run {folder / 'run'}"
        command += f" --train.updates 2 --train.warmup 1 --checkpoint-every {every}"
        assert call("distill", *command.split(), *flags) == 0
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    moments = [(line["update"], line["seconds"]) for line in lines if line.get("steps") == 1 and "update" in line]
    (first, began), (last, ended) = next(m for m in moments if m[0] >= updates // 4), moments[-1]
    seconds = (ended - began) / (last - first) * updates
    saved = spent.seconds["checkpoints"]
    if device == "cpu":  # which the writer of checkpoints shares with the training
        saved += spent.seconds["writer"]
    of_checkpoints = saved / seconds * every / preset.checkpoint_every
    return {"checkpoints": of_checkpoints, "logging": spent.seconds["logging"] / seconds}, spent.calls


@pytest.mark.slow
def test_what_is_counted(tmp_path):
    """So short a run says nothing of the shares."""
    flags = "--log-every 2 --evaluation.num-samples 64 --batch-size 4".split()
    found, calls = shares(tmp_path, PRESETS["digits"], "cpu", 6, *flags, *TINY_NETWORK)
    assert calls["logging"] == 2 + 6 and calls["writer"] == 1 + 2  # the teacher's two updates, then the round
    assert found["checkpoints"] > 0 and 0 < found["logging"] < 1


@pytest.mark.gpu
def test_checkpoints_and_logging_cost_little(tmp_path):
    """On random images, evaluated by an untrained Inception network, which needs no download."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    preset, rng = PRESETS["cifar10-fast"], np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8))
    torch.manual_seed(0)
    save_file(InceptionV3().state_dict(), tmp_path / "untrained.safetensors")
    flags = f"--data {tmp_path}/images.npz --evaluation.features {tmp_path}/untrained.safetensors".split()
    found, calls = shares(tmp_path, preset, "cuda", 100, *flags, "--evaluation.num-samples", "256")
    print(", ".join(f"{name}: {share:.2%} of the time" for name, share in found.items()), dict(calls))
    assert {name: share for name, share in found.items() if share > MOST[name]} == {}
