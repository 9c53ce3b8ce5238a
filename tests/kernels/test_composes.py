"""The operations within what PyTorch puts around a network: checkpointing, functional_call, sharding, gradients of any layout.

In the interpreter, with the results of the operation by itself as what is expected.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pdfast_kernels import (
    AdamEma,
    FusedAdamW,
    attention,
    ddim_step_weighted_loss,
    group_norm,
    group_norm_attention,
    use,
)
from tests.kernels.compare import assert_relative, channels_last

C, POSITIONS = 16, 16


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))
        self.film = nn.Parameter(torch.rand(2, 2 * C))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.film.chunk(2, dim=1)
        return group_norm(x, 4, self.weight, self.bias, scale=scale, shift=shift, silu=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.rand(3 * C, C) / C**0.5)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.permute(0, 2, 3, 1).reshape(len(x), POSITIONS, C)
        out = attention(*(positions @ self.qkv.t()).view(len(x), POSITIONS, 3, 1, C).unbind(2))
        return out.view(len(x), 4, 4, C).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        shapes = ((C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,))
        self.parts = nn.ParameterList(torch.rand(shape) / C**0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_attention(x, 4, *self.parts, 1)


class Loss(nn.Module):
    """The losses as an image, so that it is called like the others."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        row, column = torch.full((2,), 0.5), torch.full((2, 1), 0.5)
        z = x.detach()
        return ddim_step_weighted_loss(x * self.gain, z, z, z, row, column, column, column, row).view(-1, 1, 1, 1)


MODULES = {"group_norm": Norm, "attention": Attention, "group_norm_attention": Block, "loss": Loss}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


@pytest.fixture
def x(draw):
    return channels_last(draw(2, C, 4, 4)).requires_grad_()


def results(call, x, parameters, gradient=None):
    """The value and all gradients."""
    y = call(x)
    gradient = torch.ones_like(y) if gradient is None else gradient
    return [y, *torch.autograd.grad(y, [x, *parameters], gradient)]


def assert_same(ours, theirs):
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_checkpointed(triton_kernels, module, x):
    parameters = [*module.parameters()]
    again = results(lambda x: checkpoint(module, x, use_reentrant=False), x, parameters)
    assert_same(again, results(module, x, parameters))


def test_checkpointed_nothing_of_the_operation_is_kept(triton_kernels, draw, x):
    """Only the input is, until the backward computes again: not the statistics, not the output."""
    torch.manual_seed(0)
    module, kept = Norm(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        checkpoint(module, x, use_reentrant=False)
    assert kept == [x.shape]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(x)
    assert len(kept) > 2 and (2, 4) in kept  # the statistics


def test_saved_elsewhere_in_another_layout(triton_kernels, module, x):
    """As by `save_on_cpu(pin_memory=True)`, which brings a contiguous copy back."""
    parameters = [*module.parameters()]
    expected = results(module, x, parameters)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous().clone()):
        for one, other in zip(results(module, x, parameters), expected, strict=True):
            assert_relative(one, other)


def test_functional_call(triton_kernels, module, x):
    torch.manual_seed(1)
    other = type(module)()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    ours = results(lambda x: torch.func.functional_call(module, parameters, (x,)), x, parameters.values())
    assert_same(ours, results(other, x, [*other.parameters()]))
    assert all(p.grad is None for p in module.parameters())


def test_gradients_of_other_strides(triton_kernels, draw, module, x):
    """Of stride 0, contiguous, channels-last, transposed and with gaps: the same numbers, the same bits."""
    shape, parameters = module(x).shape, [*module.parameters()]
    dense = draw(*shape)
    with_gaps = torch.stack([dense, 0 * dense], dim=-1)[..., 0]
    layouts = [channels_last(dense), dense.transpose(2, 3).contiguous().transpose(2, 3), with_gaps]
    expected = results(module, x, parameters, dense)
    for gradient in layouts:
        assert_same(results(module, x, parameters, gradient), expected)
    spread = torch.tensor(0.5).expand(shape)
    assert set(spread.stride()) == {0}
    assert_same(results(module, x, parameters, spread), results(module, x, parameters, spread.clone()))
    ours = torch.autograd.grad(module(x).sum(), [x, *parameters])
    assert_same(ours, results(module, x, parameters)[1:])


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_parameters_alone_have_gradients(triton_kernels, module, x, mode):
    """Below a frozen part of a network. PyTorch's own channels-last GroupNorm on a CPU ends the process here."""
    parameters = [*module.parameters()]
    with use(mode):
        y = module(x.detach())
        ours = torch.autograd.grad(y, parameters, torch.ones_like(y))
        for one, other in zip(ours, results(module, x, parameters)[2:], strict=True):
            assert_relative(one, other)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: layer() for name, layer in MODULES.items()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x.sum()


def sharded(rank: int, mode: str, store: str) -> None:
    """Of one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        with use(mode):
            generator = torch.Generator().manual_seed(2)
            x = channels_last(torch.randn(2, C, 4, 4, generator=generator))
            whole, network = Network(), Network()
            for layer in network.layers.values():
                fully_shard(layer)
            fully_shard(network)
            whole(x).backward()
            network(x).backward()
            for (name, p), other in zip(network.named_parameters(), whole.parameters(), strict=True):
                assert torch.allclose(p.grad.full_tensor(), other.grad, rtol=1e-6, atol=1e-8), name
            step(network, [p.grad for p in whole.parameters()], whole)
            for optimizer in (
                FusedAdamW(network.parameters(), lr=0.125, ema_decay=0.5),
                torch.optim.AdamW(whole.parameters(), lr=0.125),
            ):
                optimizer.step()
                if isinstance(optimizer, FusedAdamW):
                    assert all(type(average) is DTensor for average in optimizer.ema())
            for p, other in zip(network.parameters(), whole.parameters(), strict=True):
                assert torch.allclose(p.full_tensor(), other, rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # as the commands end: a thread of gloo's that outlives the interpreter would abort the process


def step(network: nn.Module, gradients: list[Tensor], whole: nn.Module) -> None:
    """An optimizer's step on this process's shards, and on whole parameters."""
    local = [p.to_local() for p in network.parameters()]
    scalars = torch.tensor([0.125, 1.0, 1.0, 0.0, 0.0])
    for parameters, grads in (
        (local, [p.grad.to_local() for p in network.parameters()]),
        ([p.detach() for p in whole.parameters()], gradients),
    ):
        zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        AdamEma([p.detach() for p in parameters], *zeros).step(grads, scalars)
    for p, other in zip(network.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.full_tensor(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_sharded_by_fsdp2(tmp_path, mode):
    """fully_shard over two processes: gradients and an optimizer's step as without it."""
    mp.spawn(sharded, (mode, str(tmp_path / "store")), nprocs=2)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_empty_shards(triton_kernels, draw, mode):
    """What a process has of a parameter with fewer rows than there are processes, between others or alone."""
    for sizes in ([(0,), (5,), (0, 3), (2, 3), (0, 3, 3, 4)], [(0,)], [(0, 3), (0,)]):
        parameters = [draw(*size) for size in sizes]
        gradients, state = [draw(*size) for size in sizes], copy.deepcopy(parameters)
        zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        expected = [p - 0.125 * g.sign() for p, g in zip(parameters, gradients, strict=True)]
        averages = [(p + q) / 2 for p, q in zip(parameters, expected, strict=True)]
        with use(mode):
            AdamEma(parameters, *zeros, state).step(gradients, torch.tensor([0.125, 1.0, 1.0, 0.5, 0.0]))
        for ours, theirs in zip([*parameters, *state], [*expected, *averages], strict=True):
            assert_relative(ours, theirs)
