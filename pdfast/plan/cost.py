"""What a job costs, counted without running it: operations, bytes of memory, bytes sent between processes.

`memory` and `communication` are the formulas that `--dry-run` prints and docs/scaling.md explains. With R copies of the
network in S parts each, a ring moves (S - 1)/S of the gathered bytes through each process for an all-gather or a
reduce-scatter, and 2 (R - 1)/R of the reduced bytes for an all-reduce.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from pdfast.engine.cost import UpdateCost, count_parameters, empty_network, inputs
from pdfast.networks import Network, NetworkConfig
from pdfast.networks.layers import Attention, GroupNorm
from pdfast_kernels.ops.attention.attention import unsupported_dim

FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are, by how they are kept and sent."""

    all: int
    of_blocks: int
    """They are cast to the dtype of activations, the rest stays in float32."""
    of_largest_block: int

    def in_dtype(self, dtype: torch.dtype) -> int:
        """Return bytes of all parameters as they travel, and as a frozen copy keeps them."""
        return self.of_blocks * dtype.itemsize + (self.all - self.of_blocks) * FLOAT


@lru_cache
def parameters(network: NetworkConfig) -> Parameters:
    model = empty_network(network)
    blocks = [count_parameters(block.parameters()) for block in model.blocks()]
    return Parameters(count_parameters(model.parameters()), sum(blocks), max(blocks, default=0))


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward keeps for the backward; parameters are not counted."""

    an_image: int
    whatever_the_batch: int
    """Parameters cast to the dtype of activations."""


@lru_cache
def kept(
    network: NetworkConfig, dtype: torch.dtype = torch.float32, recomputed: bool = False, fused: bool = False
) -> Kept:
    """Return what is kept with activations of `dtype`.

    recomputed: with activation checkpointing only the inputs of each block, and what the largest block keeps at a time.
    fused: normalisation and attention as the fused operations keep them (on a GPU), not as PyTorch's do.
    """
    model = empty_network(network)
    model.dtype = dtype
    if fused:
        fuse(model)
    # Shapes alone, but on the code path of a CPU: on meta, attention would take another.
    with FakeTensorMode(allow_non_fake_inputs=True) if network.runs_on_meta else nullcontext():
        if network.runs_on_meta:
            model.to_empty(device="cpu")
        two, three = (_kept_bytes(model, recomputed, *inputs(network, count, "cpu")) for count in (2, 3))
    return Kept(three - two, 3 * two - 2 * three)


def activation_bytes(
    network: NetworkConfig, dtype: torch.dtype = torch.float32, recomputed: bool = False, fused: bool = False
) -> int:
    """Return bytes that a forward keeps for the backward, an image: see `kept`."""
    return kept(network, dtype, recomputed, fused).an_image


def _kept_bytes(model: Network, recomputed: bool, *given: Tensor | None) -> int:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, Tensor] = {}  # by storage; the tensors stay, so that no storage's name is used again
    within: dict[nn.Module, int] = {}
    entered: list[nn.Module] = []
    outside = handed = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal outside
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = tensor
            if entered:
                within[entered[-1]] = within.get(entered[-1], 0) + storage.nbytes()
            else:
                outside += storage.nbytes()
        return tensor

    def enter(module: nn.Module, arguments: tuple) -> None:
        nonlocal handed
        entered.append(module)
        handed += arguments[0].numel() * arguments[0].element_size()

    def leave(module: nn.Module, arguments: tuple, result: Tensor) -> None:
        entered.pop()

    hooks = [
        hook for b in model.blocks() for hook in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))
    ]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*given)
    for hook in hooks:
        hook.remove()
    return outside + (handed + max(within.values(), default=0) if recomputed else sum(within.values()))


def fuse(model: Network) -> None:
    """Let normalisation and attention be the custom operations that a GPU runs."""
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.forward = _fused_norm(module)  # type: ignore[method-assign]
        elif isinstance(module, Attention) and unsupported_dim(module.head_dim, model.dtype) is None:
            module.forward = _fused_attention(module)  # type: ignore[method-assign,assignment]


def _fused_norm(norm: GroupNorm) -> Callable[..., Tensor]:
    def forward(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False) -> Tensor:
        operation = torch.ops.pdfast_kernels.group_norm
        return operation(x, norm.num_groups, norm.weight, norm.bias, scale, shift, norm.eps, silu)[0]

    return forward


def _fused_attention(block: Attention) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        norm, qkv, proj = block.norm, block.qkv, block.proj
        tensors = norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias
        operation = torch.ops.pdfast_kernels.group_norm_attention
        return operation(x, norm.num_groups, *tensors, x.shape[1] // block.head_dim, norm.eps)[0]

    return forward


@dataclass(frozen=True)
class Job:
    """One stage of a run on its processes, as far as its memory and its communication go."""

    network: NetworkConfig
    dtype: torch.dtype
    batch_size: int
    """Images per update, of all processes."""
    processes: int = 1
    shards: int = 1
    micro_batches: int = 1
    recompute: bool = False
    average: bool = False
    """Whether there is an EMA of the weights."""
    cost: UpdateCost = UpdateCost(teacher_forwards=2)
    teacher_sharded: bool = False
    fused: bool = False

    @property
    def copies(self) -> int:
        return self.processes // self.shards

    @property
    def micro_batch(self) -> int:
        """Images of one backward of one process."""
        return self.batch_size // self.processes // self.micro_batches


def memory(job: Job) -> dict[str, int]:
    """Return bytes of one process, by what they are for, at the moment when there is most: the student's backward.

    Not in it: the images of the batch, what an operation needs while it runs, and what the allocator leaves unused.
    """
    count = parameters(job.network)
    part = FLOAT * count.all // job.shards
    # Between micro-batches FSDP keeps the sum of the gradients whole; only the last one divides it.
    gradients = FLOAT * count.all if job.micro_batches > 1 else part
    activations = kept(job.network, job.dtype, job.recompute, job.fused)
    averages = job.average + job.cost.fast_average
    items = {"weights": part, "gradients": gradients, "Adam": 2 * part, "average": averages * part}
    if job.cost.kept_targets:
        kept_values = job.cost.tensors_a_target * math.prod(job.network.image_shape)
        items["kept targets"] = FLOAT * kept_values * job.cost.kept_targets // job.processes
    if job.cost.has_teacher:
        items["teacher"] = count.in_dtype(job.dtype) // (job.shards if job.teacher_sharded else 1)
    items["activations"] = activations.an_image * job.micro_batch
    if job.shards == 1:
        if job.dtype != torch.float32:
            items["cast weights"] = activations.whatever_the_batch
        if job.processes > 1:
            items["buffers"] = FLOAT * count.all  # the gradients' copies, side by side
    else:
        # What is outside of the blocks; of two blocks, this and the next, the parameters and the buffer they came in;
        # of two, this and the one before, the gradient on its way.
        root = FLOAT * (count.all - count.of_blocks)
        items["buffers"] = root + count.of_largest_block * (4 * job.dtype.itemsize + 2 * FLOAT)
    return items


def communication(job: Job) -> dict[str, int]:
    """Return bytes that one process sends, and as many that it receives, in one update, by collective."""
    count = parameters(job.network)
    others = (job.shards - 1) / job.shards
    gathers: float = 2 * job.micro_batches  # of the student, forward and backward
    if job.teacher_sharded:
        gathers += job.cost.teacher_forwards - job.cost.fast_average
    if job.cost.fast_average:
        gathers += 1
    gradients = FLOAT * count.all
    return {
        "all-gather": round(gathers * others * count.in_dtype(job.dtype)),
        "reduce-scatter": round(others * gradients),
        "all-reduce": round(2 * (job.copies - 1) / job.copies * gradients / job.shards),
    }
