"""Equal copies of a network: what they exchange in an update, and that it is the update of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from pdfast.engine import parallelize
from pdfast.engine.optimizer import Optimizer
from pdfast.engine.world import World

TWO = World(torch.device("cpu"), rank=0, size=2)
SIZES = 3, 5, 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.SiLU(), nn.Linear(SIZES[1], SIZES[2]))


def backward(model, x):
    """The loss of a batch; its gradient is in the parameters."""
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


class Peer:
    """The other process: its share is added to whatever is reduced."""

    def __init__(self, monkeypatch):
        self.share = lambda buffer: torch.zeros_like(buffer)
        self.buffers = []
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def all_reduce(self, buffer):
        self.buffers.append(buffer)
        buffer.add_(self.share(buffer))


@pytest.fixture
def peer(monkeypatch):
    return Peer(monkeypatch)


def halved(gradients, loss, like):
    """The other's buffer before the sum, put together without the code that is tested."""
    pieces = []
    for gradient in gradients:
        flat = gradient.flatten() / 2
        pieces.append(nn.functional.pad(flat, (0, -len(flat) % 4)))
    return torch.cat([*pieces, loss.view(1) / 2]).view_as(like)


def test_an_update_of_two_is_that_of_one_with_both_halves(peer):
    ours, whole, other = network(), network(), network()
    two = Optimizer(ours, TWO, clip=0.1, ema=0.9)
    one = Optimizer(whole, World(torch.device("cpu")), clip=0.1, ema=0.9)
    for update in range(4):
        x = torch.randn(8, SIZES[0], generator=torch.Generator().manual_seed(update))
        other.load_state_dict(ours.state_dict())
        other.zero_grad()
        loss = backward(other, x[4:])
        theirs = halved([p.grad for p in other.parameters()], loss, torch.empty(15 + 1 + 5 + 3 + 10 + 2 + 2 + 2 + 1))
        peer.share = lambda buffer, theirs=theirs: theirs
        for model, optimizer, batch in ((ours, two, x[:4]), (whole, one, x)):
            optimizer.set(update, 1e-2)
            optimizer.step(backward(model, batch))
        torch.testing.assert_close(two.norm, one.norm)
        for a, b in zip(ours.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(peer.buffers) == 4, "one collective an update"
    assert len({buffer.data_ptr() for buffer in peer.buffers}) == 1, "a CUDA graph needs the same place"
    for name, value in two.state().items():
        torch.testing.assert_close(value, one.state()[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_the_other_is_skipped_here(where, value, peer):
    """A gradient's first element, or the loss."""
    model = network()
    optimizer = Optimizer(model, TWO, clip=1.0)
    before = [p.detach().clone() for p in model.parameters()]

    def poisoned(buffer):
        share = torch.zeros_like(buffer)
        share[where] = value
        return share

    peer.share = poisoned
    optimizer.set(0, 1e-2)
    optimizer.step(backward(model, torch.ones(4, SIZES[0])))
    assert optimizer.skipped.tolist() == [1, 1] and int(optimizer.steps) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    peer.share = torch.zeros_like
    optimizer.set(1, 1e-2)
    optimizer.step(backward(model, torch.ones(4, SIZES[0])))
    assert optimizer.skipped.tolist() == [1, 0] and int(optimizer.steps) == 1


def test_gradients_begin_where_wide_loads_may(peer):
    model = network()
    optimizer = Optimizer(model, TWO, clip=1.0)
    taken = []
    optimizer._adam.step = lambda gradients, scalars: taken.extend(gradients)
    optimizer.set(0, 1e-2)
    optimizer.step(backward(model, torch.ones(4, SIZES[0])))
    assert len(taken) == 4 and all(g.is_contiguous() and g.data_ptr() % 16 == 0 for g in taken)


def test_copies_keep_plain_parameters():
    model = network()
    parallelize.shard(model, TWO)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
