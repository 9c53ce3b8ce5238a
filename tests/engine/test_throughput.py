"""What a running job knows of itself."""

import math

import torch

from pdfast.engine.throughput import BUCKETS, Losses, Speed, peak_flops, peak_memory_mib
from pdfast.engine.world import World

ALONE = World(torch.device("cpu"))


def test_losses_by_step_index():
    losses, steps = Losses(ALONE), torch.tensor(16)
    values, k = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([1, 2, 16, 9])
    losses.add(values, k, steps)
    losses.add(values + 1, k, steps)
    mean, by_step = losses.read()
    assert mean == 3.5 and by_step == [2.0, None, None, None, 6.5, None, None, 3.5]
    assert math.isnan(losses.read()[0]), "what was read is forgotten"


def test_fewer_steps_than_buckets():
    losses = Losses(ALONE)
    losses.add(torch.tensor([1.0, 2.0]), torch.tensor([1, 2]), torch.tensor(2))
    assert losses.read()[1] == [1.0, *[None] * (BUCKETS // 2 - 1), 2.0, *[None] * (BUCKETS // 2 - 1)]


def test_what_is_not_finite_is_left_out_and_its_step_index_kept():
    losses = Losses(ALONE)
    losses.add(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([5, 6, 7]), torch.tensor(8))
    assert losses.read()[0] == 2.0 and losses.bad_step_index == 6
    losses.add(torch.tensor([1.0]), torch.tensor([2]), torch.tensor(8))
    assert losses.bad_step_index == 6


def test_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    speed = Speed(batch_size=32, evaluations_per_image=3, flops_per_image=1e9, peak_flops=1e12)
    speed.start(10, 0.5)
    now[0] += 4.0
    assert speed.read(30, 1.5) == {
        "images_per_second": 160.0,
        "update_seconds": 0.2,
        "data_wait": 0.25,
        "network_evaluations_per_second": 480.0,
        "model_flop_utilisation": 0.16,
    }
    now[0] += 2.0
    assert speed.read(31, 1.5)["update_seconds"] == 2.0


def test_the_machine_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32, 0.01) < 1e14
    assert 50 < peak_memory_mib(torch.device("cpu")) < 1e6
