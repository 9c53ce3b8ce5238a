"""Adam, clip and averages against float64; what is not finite; state."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pdfast.engine import parallelize
from pdfast.engine.optimizer import Optimizer, linear_decay, linear_warmup
from pdfast.engine.world import World
from pdfast.io.errors import UsageError

ALONE = World(torch.device("cpu"))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2))


def step(model, optimizer, update, scale=1.0, learning_rate=1e-2):
    """One update of a quadratic loss; returns the loss."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(update), dtype=torch.float64).to(
        next(model.parameters()).dtype
    )
    loss = scale * model(x).square().mean()
    loss.backward()
    optimizer.set(update, learning_rate)
    optimizer.step(loss.detach())
    return loss.detach()


def in_float64(updates, clip, ema, weight_decay, fast_ema=0.0):
    """The same by torch.optim.AdamW, one parameter after the other, in float64: weights, the average, the fast one."""
    model = network().double()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay, foreach=False)
    averages, fast = ([p.detach().clone() for p in model.parameters()] for _ in range(2))
    for update in range(updates):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(update), dtype=torch.float64)
        adam.zero_grad()
        model(x).square().mean().backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(clip / (norm + 1e-6), 1)
        adam.step()
        for tensors, asked in ((averages, ema), (fast, fast_ema)):
            decay = min(asked, (update + 1) / (update + 10))
            for average, p in zip(tensors, model.parameters(), strict=True):
                average.mul_(decay).add_((1 - decay) * p.detach())
    return [p.detach() for p in model.parameters()], averages, fast


def assert_near(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach().double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["pdfast", "torch"])
@pytest.mark.parametrize("clip", [1e-2, 1e3])
def test_as_in_float64(backend, clip):
    model = network()
    optimizer = Optimizer(model, ALONE, clip=clip, ema=0.9, weight_decay=0.1, backend=backend)
    for update in range(6):
        step(model, optimizer, update)
    weights, averages, _ = in_float64(6, clip, 0.9, 0.1)
    assert_near(model.parameters(), weights)
    optimizer.copy_ema_to_model()
    assert_near(model.parameters(), averages)


@pytest.mark.parametrize("backend", ["pdfast", "torch"])
@pytest.mark.parametrize("ema", [0.3, 0.0])
@pytest.mark.parametrize("fast_ema", [0.2, 0.0])
def test_the_average_in_a_network(backend, ema, fast_ema):
    """Past the warm-up of the fast average, within that of the slow one; they begin with the model's weights."""
    model, fast = network(), network(1)
    addresses = [p.data_ptr() for p in fast.parameters()]
    optimizer = Optimizer(
        model, ALONE, clip=1.0, ema=ema, fast_ema=fast_ema, fast=fast, weight_decay=0.1, backend=backend
    )
    assert all(map(torch.equal, fast.parameters(), model.parameters()))
    for update in range(4):
        step(model, optimizer, update)
        weights, averages, fasts = in_float64(update + 1, 1.0, ema, 0.1, fast_ema)
        assert_near(model.parameters(), weights)
        assert_near(fast.parameters(), fasts)
    x = torch.ones(2, 3)
    torch.testing.assert_close(fast(x), torch.func.functional_call(model, dict(fast.named_parameters()), x))
    optimizer.copy_ema_to_model()
    assert_near(model.parameters(), averages if ema else weights)
    assert_near(fast.parameters(), fasts)
    assert addresses == [p.data_ptr() for p in fast.parameters()]


def sharded(rank: int, store: str) -> None:
    """Of one of two processes: the network is evaluated after each update, which gathers its weights anew."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        world, model, fast = World(torch.device("cpu"), rank, 2, mesh), network(), network(1)
        for net in (model, fast):
            parallelize.shard(net, world)
        optimizer = Optimizer(model, world, clip=1.0, ema=0.9, fast_ema=0.2, fast=fast)
        whole, x = network().double(), torch.ones(2, 3)
        for update in range(4):
            step(model, optimizer, update)
            weights = dict(zip(whole.state_dict(), in_float64(update + 1, 1.0, 0.9, 0.0, 0.2)[2], strict=True))
            with torch.no_grad():
                assert_near([fast(x)], [torch.func.functional_call(whole, weights, x.double())])
    finally:
        dist.destroy_process_group()


def test_the_average_in_a_sharded_network(tmp_path):
    mp.spawn(sharded, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("backend", ["pdfast", "torch"])
def test_the_rest_does_not_depend_on_the_average_in_a_network(backend):
    models = network(), network()
    optimizers = [
        Optimizer(m, ALONE, clip=1.0, ema=0.9, fast_ema=0.5, fast=fast, backend=backend)
        for m, fast in zip(models, (network(), None), strict=True)
    ]
    for update in range(3):
        for m, optimizer in zip(models, optimizers, strict=True):
            step(m, optimizer, update)
    both, alone = (optimizer.state() for optimizer in optimizers)
    assert both.keys() - alone.keys() == {f"fast.{name}" for name, _ in models[0].named_parameters()}
    assert all(torch.equal(value, both[name]) for name, value in alone.items())


@pytest.mark.parametrize("backend", ["pdfast", "torch"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_only_counts(backend, scale):
    model, spared = network(), network()
    settings = {"clip": 1.0, "ema": 0.9, "fast_ema": 0.5, "backend": backend}
    ours, others = (Optimizer(m, ALONE, fast=network(), **settings) for m in (model, spared))
    for optimizer, m in ((ours, model), (others, spared)):
        step(m, optimizer, 0)
    before = {name: value.clone() for name, value in ours.state().items()}
    step(model, ours, 1, scale=scale)
    assert all(torch.equal(value, before[name]) for name, value in ours.state().items())
    assert ours.skipped.tolist() == [1, 1] and int(ours.steps) == 1
    for optimizer, m in ((ours, model), (others, spared)):
        step(m, optimizer, 2)
    assert ours.skipped.tolist() == [1, 0] and int(ours.steps) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.state().values(), others.state().values(), strict=True))


@pytest.mark.parametrize("ema", [0.5, 0.0])
@pytest.mark.parametrize("with_fast", [True, False])
def test_state_and_reset(ema, with_fast):
    model, other = network(), network(1)

    def make(model):
        fast = network(2) if with_fast else None
        return Optimizer(model, ALONE, clip=1.0, ema=ema, fast_ema=0.25, fast=fast)

    optimizer, again = make(model), make(other)
    step(model, optimizer, 0)
    again.load_state({name: value.clone() for name, value in (optimizer.state() | optimizer.counters()).items()})
    for m, o in ((model, optimizer), (other, again)):
        step(m, o, 1)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.state().values(), again.state().values(), strict=True))
    optimizer.reset()
    fresh = make(other)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.state().values(), fresh.state().values(), strict=True))
    with pytest.raises(KeyError):
        again.load_state({"weight.0.weight": torch.zeros(5, 3)})


def test_gradients_are_gone_after_a_step():
    model = network()
    step(model, Optimizer(model, ALONE, clip=1.0), 0)
    assert all(p.grad is None for p in model.parameters())


def test_apex_that_is_not_installed():
    with pytest.raises(UsageError, match="apex is not installed"):
        Optimizer(network(), ALONE, clip=1.0, backend="apex")


def test_factors_of_the_learning_rate():
    assert [linear_warmup(u, 4) for u in range(5)] == [0.25, 0.5, 0.75, 1, 1] and linear_warmup(0, 0) == 1
    assert [linear_decay(u, 4) for u in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [linear_decay(u, 4, 0.5) for u in range(4)] == [1, 1, 1, 0.5] and linear_decay(3, 4, 0.0) == 1
