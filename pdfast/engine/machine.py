"""The processes of a run, and how networks, updates and optimizers are laid out for them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pdfast.config import DistillConfig, EngineConfig, RunConfig
from pdfast.diffusion import noise
from pdfast.diffusion.noise import Stream
from pdfast.engine import parallelize
from pdfast.engine.cost import UpdateCost, parameters_and_flops
from pdfast.engine.device import describe
from pdfast.engine.graph import CUDAGraphed
from pdfast.engine.optimizer import Optimizer
from pdfast.engine.throughput import Losses, Speed, peak_flops
from pdfast.engine.watchdog import Watchdog
from pdfast.engine.world import World, open_world
from pdfast.io import interrupt
from pdfast.io.errors import RunError, UsageError
from pdfast.loss import identity
from pdfast.networks import Network, NetworkConfig

RETRY_SECONDS = 5.0
TEACHER_SHARE = 1 / 8  # of a GPU's memory, from which on a copy of the teacher in each process is too much


def teacher_in_parts(settings: EngineConfig, network: NetworkConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the teacher is sharded where the student is."""
    if settings.teacher_shard != "auto" or device.type != "cuda":
        return settings.teacher_shard == "on"
    copy = parameters_and_flops(network)[0] * dtype.itemsize
    return copy > TEACHER_SHARE * torch.cuda.get_device_properties(device).total_memory


@dataclass(frozen=True)
class Machine:
    """The processes of a run and the settings of its engine."""

    world: World
    settings: EngineConfig
    network: NetworkConfig
    dtype: torch.dtype
    watchdog: Watchdog
    peak_flops: float
    """Of one device, a second, measured."""

    @property
    def compiled(self) -> bool:
        return parallelize.chosen_compile(self.settings.compile, self.world.device)

    @property
    def compile_function(self) -> Callable[[Callable], Callable]:
        """What compiles a function around the networks, where they are compiled too."""
        return parallelize.compile_function if self.compiled else identity

    @property
    def _in_one_graph(self) -> bool:
        return self.world.device.type == "cpu" and self.world.shards == 1

    @property
    def teacher_sharded(self) -> bool:
        """Whether each process holds a part of the teacher only."""
        return self.world.shards > 1 and teacher_in_parts(self.settings, self.network, self.dtype, self.world.device)

    @property
    def description(self) -> str:
        """In one line, for people."""
        world = self.world
        parts = [describe(world.device), str(self.dtype).removeprefix("torch.")]
        parts += ["compiled"] if self.compiled else []
        if world.size > 1:
            parts += [f"{world.size} processes, {world.size // world.shards} copies in {world.shards} parts"]
            parts += ["teacher in parts"] if self.teacher_sharded else []
        return ", ".join(parts)

    def prepare_student(self, network: Network) -> Network:
        """Return the network ready to train: float32 weights, sharded over the processes."""
        self.watchdog.begin()
        network.to(self.world.device).dtype = self.dtype
        if self.settings.recompute:
            parallelize.checkpoint_activations(network)
        if self.compiled:
            parallelize.compile_network(network, whole=self._in_one_graph)
        parallelize.shard(network, self.world)
        return network

    def prepare_teacher(self) -> Network:
        """Return a frozen teacher whose weights are yet to be written; its blocks' are kept in the dtype of activations."""
        network = self.network.build().to(self.world.device).eval().requires_grad_(False)
        network.dtype = self.dtype
        parallelize.cast_blocks(network, self.dtype)
        if self.compiled:
            parallelize.compile_network(network, whole=self._in_one_graph)
        if self.teacher_sharded:
            parallelize.shard(network, self.world)
        return network

    def optimizer(
        self,
        network: Network,
        *,
        clip: float,
        ema: float,
        fast_ema: float = 0.0,
        fast: Network | None = None,
        weight_decay: float = 0.0,
    ) -> Optimizer:
        return Optimizer(
            network,
            self.world,
            clip=clip,
            ema=ema,
            fast_ema=fast_ema,
            fast=fast,
            weight_decay=weight_decay,
            backend=self.settings.optimizer,
        )

    def cuda_graphed(self, update: Callable[[], None]) -> Callable[[], None]:
        """Return `update` as a CUDA graph, where that is possible."""
        return CUDAGraphed(update, self.world, self.settings.graph)

    def whole_weights(self, network: Network) -> dict[str, Tensor]:
        """Return all weights, float32 on the CPU, in rank 0. All processes must call it."""
        return parallelize.whole_weights(network, self.world)

    def speed(self, batch_size: int, cost: UpdateCost) -> Speed:
        """Return the meter of a stage whose updates cost so much for each image."""
        flops = cost.flops * parameters_and_flops(self.network)[1]
        return Speed(batch_size, cost.evaluations, flops, self.peak_flops * self.world.size)

    def seed_dropout(self, seed: int, update: int) -> None:
        """Dropout is a function of the seed, the update and the process."""
        index = torch.tensor([self.world.rank])
        torch.manual_seed(int(noise.integer(noise.key(seed, Stream.DROPOUT, 0, update), index, 1 << 32)))

    def write_with_retry(self, write: Callable[[], object]) -> None:
        """Write a stage's results, in rank 0. Finished work is not to be lost: where the disk is full this is tried again for half
        the patience. Raises RunError where that did not help."""

        def attempt() -> None:
            end, warned = time.monotonic() + self.settings.patience / 2, False
            while True:
                try:
                    write()
                    return
                except RunError as error:
                    if time.monotonic() > end or interrupt.requested():
                        raise
                    if not warned:
                        print(f"pdfast: warning: {error}; trying again every few seconds", file=sys.stderr, flush=True)
                    warned = True
                    time.sleep(min(RETRY_SECONDS, self.settings.patience / 4))

        self.world.run_on_rank0(attempt)

    def asked_to_stop(self, place: str) -> bool:
        """Tell whether any process was asked to stop; called by all, at least after each update and each batch of samples."""
        self.watchdog.beat(place)
        return self.world.any(interrupt.requested())[0]

    def stop_if_not_finite(self, optimizer: Optimizer, losses: Losses, update: int, where: str, every: int) -> None:
        """Raise a RunError after too many updates in a row that were not finite. On a GPU this is checked at log steps only, to avoid a
        sync."""
        if self.world.device.type == "cuda" and (update + 1) % every:
            return
        in_a_row = int(optimizer.skipped[1])
        if in_a_row >= self.settings.non_finite_limit:
            k = int(self.world.gather(torch.tensor([losses.bad_step_index])).max())
            raise RunError(
                f"{where}: the loss or its gradient was not finite in {in_a_row} updates in a row, up to update {update}"
                f"{f', last at step index {k}' if k else ''}; the weights were left as they were: lower the learning rate, "
                "or try another weighting"
            )


@contextmanager
def open_machine(config: RunConfig) -> Iterator[Machine]:
    """Open the machine of a run, until the end of the block. UsageError for settings that it cannot have."""
    engine = config.engine
    with open_world(config.device, engine.shard) as world:
        batches: dict[str, int] = {}
        if not isinstance(config, DistillConfig) or config.teacher is None:
            batches |= {"train.batch-size": config.train.batch_size}
        if isinstance(config, DistillConfig):
            batches |= {"batch-size": config.batch_size}
        parts = world.size * engine.micro_batches
        for flag, size in batches.items():
            if size % parts:
                raise UsageError(
                    f"--{flag} {size} must be a multiple of {parts}: {world.size} processes times {engine.micro_batches} "
                    "micro-batches"
                )
        if parallelize.chosen_compile(engine.compile, world.device):
            parallelize.check_compiler(world.device)
        dtype = parallelize.chosen_dtype(engine.dtype, world.device)
        # Keep fp32 exact: TF32's error in the network's input exceeds the smallest noise in it.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = engine.deterministic
        with Watchdog(world, engine.patience) as watchdog:
            network = config.asked_network if isinstance(config, DistillConfig) else config.network
            yield Machine(world, engine, network, dtype, watchdog, peak_flops(world.device, dtype))
