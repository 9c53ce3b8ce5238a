"""Precision, activation checkpointing, compilation and sharding of a network.

    activation checkpointing -> compile each block, in place -> fully_shard each block, then the root

in this order, all from outside of a plain module, whose state-dict keys stay. A network says by `blocks()` what its units
are and by `dtype` what its activations are; one that has neither is a unit by itself.
"""

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pdfast.engine.world import World
from pdfast.io.errors import NO_COMPILER, UsageError
from pdfast.networks import Network

MANY_GRAPHS = 1024  # of one code object: the blocks of a network share one, and each has its own shapes


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations for `auto`, `fp32` or `bf16`."""
    bf16 = name == "bf16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def chosen_compile(name: str, device: torch.device) -> bool:
    """Tell whether blocks are compiled for `auto`, `on` or `off`."""
    return name == "on" or (name == "auto" and device.type == "cuda")


def check_compiler(device: torch.device) -> None:
    """Raise a UsageError where there is none of C++, which compiled code for a CPU needs: Inductor misses it at the first
    update."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(NO_COMPILER) from None


def for_sampling(network: Network, device: torch.device, dtype: str, compile: str) -> None:
    """Lay out a network for sampling, as the run that made it did for its evaluation."""
    network.dtype = chosen_dtype(dtype, device)
    cast_blocks(network, network.dtype)
    if chosen_compile(compile, device):
        check_compiler(device)
        compile_network(network, whole=device.type == "cpu")


def blocks(network: Any) -> list[Any]:
    """Return the units of compilation, checkpointing and sharding."""
    return list(network.blocks()) if hasattr(network, "blocks") else [network]


def cast_blocks(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the blocks' parameters in `dtype`, as the same blocks cast them at use: the values are equal, bit for bit."""
    for block in blocks(network):
        block.to(dtype)


def checkpoint_activations(network: nn.Module) -> None:
    """Keep only each block's inputs for the backward, and recompute the block there."""
    for block in blocks(network):
        inner = block.forward

        def forward(*arguments: Tensor, inner=inner) -> Tensor:
            return checkpoint(inner, *arguments, use_reentrant=False)

        block.forward = forward


def compile_network(network: nn.Module, *, whole: bool = False) -> None:
    """Compile each block in place, without graph breaks; or the network as one.

    One graph saves the calls between blocks, which a CPU feels and a CUDA graph does not have; it cannot be sharded.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MANY_GRAPHS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, MANY_GRAPHS
    )
    # Where there is that option (torch 2.13), no block looks through the graphs of all others before it finds its own.
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    for block in [network] if whole else blocks(network):
        block.compile(fullgraph=True, dynamic=False, **isolated)


@cache
def compile_function(function: Callable) -> Callable:
    """Return a function compiled as one graph, once a process."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def compiled_graphs() -> int:
    """Return how many graphs this process has compiled: a number that does not grow once everything ran."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def shard(network: nn.Module, world: World, *, reduced: torch.dtype = torch.float32) -> None:
    """Shard the parameters over the mesh; gradients are averaged in `reduced`. Replicas keep plain tensors: see
    `pdfast.engine.replicas`.

    Parameters travel in the network's dtype where its blocks use them so, the rest in their own.
    """
    if world.shards == 1:
        return
    dtype = getattr(network, "dtype", torch.float32)
    own = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    of_blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    sharded = [block for block in blocks(network) if block is not network]
    for block in sharded:
        fully_shard(block, mesh=world.mesh, mp_policy=own if dtype == torch.float32 else of_blocks)
    fully_shard(network, mesh=world.mesh, mp_policy=own, reshard_after_forward=True)
    for block, following in zip(sharded, sharded[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def last_of_batch(network: Any, last: bool) -> None:
    """Set whether the next backward completes the gradient: only then do sharded processes exchange it."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(last)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a parameter, which shares its memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(size: int, parts: int, part: int) -> tuple[int, int]:
    """Return the first row of part `part` of `parts`, and the row after its last, of a tensor of `size` rows: as
    torch.chunk."""
    each = -(-size // parts)
    return min(part * each, size), min((part + 1) * each, size)


@torch.no_grad()
def set_weights(network: nn.Module, weights: Mapping[str, Tensor], world: World) -> None:
    """Write whole tensors, of any dtype, into the parameters where they are. KeyError or ValueError where one does not fit.

    Addresses stay, and so do CUDA graphs and compiled code.
    """
    for name, parameter in network.named_parameters():
        value = weights[name]
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        if isinstance(parameter, DTensor):
            first, end = rows(len(value), world.shards, world.shard)
            value = value[first:end]
        local(parameter).copy_(value)


@torch.no_grad()
def whole_weights(network: nn.Module, world: World) -> dict[str, Tensor]:
    """Return all weights, float32 on the CPU, in rank 0; elsewhere nothing. All processes must call it."""
    weights = {}
    for name, parameter in network.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if world.is_rank0:
            weights[name] = whole.detach().float().cpu()
    return weights
