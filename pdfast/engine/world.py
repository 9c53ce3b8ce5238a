"""The processes of a run: one alone, or those that torchrun started, on one machine or several.

Several form a mesh (replicate, shard): gradients are averaged over all of it, and parameters divided over `shard` where it
is more than one. Beside the backend that moves gradients (NCCL on GPUs) there is a gloo group for what the host must know:
whether someone was asked to stop, sampled images, sums of metrics. One process alone has neither mesh nor group.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pdfast.engine.device import open_device
from pdfast.io.errors import RunError, UsageError

PATIENCE = timedelta(hours=2)  # of a collective; the watchdog ends a run that hangs long before
T = TypeVar("T")
opened_process_groups = False
"""Whether this process has been one of several: gloo's threads may outlive the groups."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes logs, students and reports."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Shards of each parameter."""
        return 1 if self.mesh is None else self.mesh["shard"].size()

    @property
    def shard(self) -> int:
        """The shard that this process holds."""
        return 0 if self.mesh is None else self.mesh["shard"].get_local_rank()

    @property
    def replica(self) -> int:
        """The replica of the network that this process works on."""
        return 0 if self.mesh is None else self.mesh["replicate"].get_local_rank()

    def part(self, count: int) -> Tensor:
        """Return this process's indices of `count` samples, int64; padded past the end so that all ranks hold equally many."""
        each = -(-count // self.size)
        return torch.arange(self.rank * each, (self.rank + 1) * each)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Reduce each flag by `or` over all processes, which all must call it."""
        if self.control is None:
            return flags
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return tuple(values.bool().tolist())

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' tensors of one shape, on their device."""
        if self.control is None:
            return values
        total = values.detach().cpu().clone()
        dist.all_reduce(total, group=self.control)
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate all processes' CPU tensors [n, ...] of one shape: [size * n, ...]."""
        if self.control is None:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self.control)
        return torch.cat(parts)

    def collect(self, value: T) -> list[T]:
        """Return every process's picklable value, in the order of the ranks. All must call it."""
        if self.control is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Call the function in rank 0 alone and return its result in all; its UsageError or RunError is raised in all.

        The result must be a number, a string, bytes, or None.
        """
        if self.control is None:
            return function()
        outcome: list[tuple[str, object]] = [("", None)]
        if self.is_rank0:
            try:
                outcome = [("", function())]
            except (UsageError, RunError) as error:
                outcome = [(type(error).__name__, str(error))]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        [(failure, value)] = outcome
        if failure:
            raise {"UsageError": UsageError, "RunError": RunError}[failure](value)
        return value  # type: ignore[return-value]


def open_store(name: str) -> dist.Store:
    """Return a connection to the key-value store of the processes that torchrun started, under `name`.

    torchrun keeps one store over restarts: without a prefix, processes would find the addresses of those before them.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not of_torchrun and os.environ["RANK"] == "0",
        multi_tenant=True,
    )
    return dist.PrefixStore(f"pdfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}", store)


@contextmanager
def open_world(device_name: str, shard: int = 1) -> Iterator[World]:
    """The world of this process, which ends with the block. UsageError for a device that is not here, or --engine.shard that
    does not divide the number of processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if shard < 1 or size % shard:
        raise UsageError(f"--engine.shard {shard} must divide the number of processes, {size}")
    device = open_device(device_name)
    if size == 1:
        yield World(device)
        return
    global opened_process_groups
    opened_process_groups = True
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=open_store("processes"),
        rank=int(os.environ["RANK"]),
        world_size=size,
        timeout=PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        mesh = init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(device, dist.get_rank(), size, mesh, control)
    finally:
        dist.destroy_process_group()
