"""What a network costs, counted without running it: parameters, floating-point operations, bytes."""

from functools import lru_cache

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pdfast.networks import NetworkConfig, UNet


def inputs(network: NetworkConfig, count: int, device: torch.device | str) -> tuple:
    """z, phi and cond of `count` images, zeros."""
    cond = torch.zeros(count, dtype=torch.int64, device=device) if network.num_classes else None
    return torch.zeros(count, *network.image_shape, device=device), torch.zeros(count, device=device), cond


@lru_cache
def parameters_and_flops(network: NetworkConfig) -> tuple[int, int]:
    """Parameters, and floating-point operations of one forward of one image; nothing is allocated."""
    with torch.device("meta"):
        model = UNet(network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs(network, 1, "meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


@lru_cache
def activation_bytes(network: NetworkConfig, dtype: torch.dtype = torch.float32, recomputed: bool = False) -> int:
    """Bytes that a forward of one image keeps for the backward, the parameters not counted.

    recomputed: with activation checkpointing only the inputs of each block, and what the largest block keeps at a time.
    """
    with torch.device("meta"):
        model = UNet(network)
    model.dtype = dtype
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}
    within: dict[torch.nn.Module, int] = {}
    entered: list[torch.nn.Module] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in kept:
            kept[storage._cdata] = tensor, storage.nbytes()
            if entered:
                within[entered[-1]] = within.get(entered[-1], 0) + storage.nbytes()
        return tensor

    handed = 0

    def enter(module: torch.nn.Module, arguments: tuple) -> None:
        nonlocal handed
        entered.append(module)
        handed += arguments[0].numel() * arguments[0].element_size()

    def leave(module: torch.nn.Module, arguments: tuple, result: torch.Tensor) -> None:
        entered.pop()

    for block in model.blocks():
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs(network, 1, "meta"))
    total = sum(size for _, size in kept.values())
    return total - sum(within.values()) + handed + max(within.values(), default=0) if recomputed else total
