"""What a job will cost, before it is started: `--dry-run`. For a job of N processes set WORLD_SIZE=N, as torchrun does.

Times are those of this machine, whose forward is measured, or predicted for a GPU that need not be there.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from pdfast.config import DistillConfig, RunConfig, TrainConfig
from pdfast.engine.cost import UpdateCost, inputs, parameters_and_flops
from pdfast.engine.machine import teacher_in_parts
from pdfast.engine.parallelize import chosen_dtype
from pdfast.io.errors import UsageError
from pdfast.io.process import is_rank0
from pdfast.io.text import clock, count_steps
from pdfast.methods import Denoise, MethodOfRound, Reparameterize
from pdfast.networks import NetworkConfig
from pdfast.plan.budget import with_updates
from pdfast.plan.cost import Job, activation_bytes, communication, memory
from pdfast.plan.gpu import FITTED, GPUS, OF_PEAK, Gpu, GpuName, is_counted, seconds_of_update
from pdfast.plan.gpu import seconds_of_forward as predicted_forward

TIMED_FLOPS = {"cpu": 4e10, "cuda": 2e13}  # of one timed forward: seconds on a laptop, a tenth of one on a GPU
ENOUGH = 4.0  # seconds of timing after which a forward is not run again
WITHIN, BETWEEN = 450e9, 50e9
"""Bytes a second out of one GPU: NVLink of an H100, and one 400 Gbit/s adapter for each GPU, as their makers state them."""


@dataclass(frozen=True)
class _Pace:
    """How fast a job is."""

    forward: float
    """Seconds of a forward of one image on all processes."""
    gpu: Gpu | None
    """Whose times are predicted; None where they are measured."""

    def of(self, job: Job) -> float:
        """Return seconds of a forward's worth of an update, for one image on all processes."""
        if self.gpu is None:
            return self.forward
        return sum(seconds_of_update(self.gpu, job).values()) / (job.cost.flops * job.batch_size)

    def said(self, text: str) -> str:
        return text if self.gpu is None else f"{text}, predicted for {self.gpu.title}"


def _job(
    config: RunConfig, dtype: torch.dtype, device: torch.device, batch_size: int, cost: UpdateCost, *, average: bool
) -> Job:
    """Return one stage of a run. UsageError where the processes cannot share its batch."""
    engine, processes = config.engine, int(os.environ.get("WORLD_SIZE", "1"))
    if engine.shard < 1 or processes % engine.shard:
        raise UsageError(f"--engine.shard {engine.shard} must divide the number of processes, {processes}")
    if batch_size % (processes * engine.micro_batches):
        raise UsageError(
            f"a batch of {batch_size} does not divide by {processes} processes times {engine.micro_batches} micro-batches"
        )
    return Job(
        config.network,
        dtype,
        batch_size,
        processes=processes,
        shards=engine.shard,
        micro_batches=engine.micro_batches,
        recompute=engine.recompute,
        average=average,
        cost=cost,
        teacher_sharded=cost.has_teacher
        and engine.shard > 1
        and teacher_in_parts(engine, config.network, dtype, device),
        fused=dtype == torch.bfloat16 or device.type == "cuda",  # who asks for bf16 on a CPU plans for a GPU
    )


def seconds_a_forward(network: NetworkConfig, dtype: torch.dtype, most: int, device: torch.device) -> float:
    """Return seconds of one forward of one image on the device, measured on a batch of at most `most`, without compilation."""
    count = int(min(most, max(1, TIMED_FLOPS[device.type] // parameters_and_flops(network)[1])))
    model = network.build().to(device).eval()
    model.dtype = dtype
    zeros = inputs(network, count, device)

    def run() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            model(*zeros)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times = [run()]
    while len(times) < 4 and sum(times) < ENOUGH:
        times.append(run())
    return min(times) / count


def _stages(
    config: RunConfig,
    device: torch.device,
    gpu: GpuName | None,
    costs: Mapping[str, UpdateCost] = MappingProxyType({}),
) -> dict[str, Job]:
    """Return the teacher's training or conversion, where there is one, and the rounds, whose updates cost so much, by their names.
    UsageError where no time is predicted for the dtype."""
    stages = {}
    dtype = chosen_dtype(config.engine.dtype, torch.device("cuda") if gpu else device)
    if gpu and dtype != torch.bfloat16:
        raise UsageError(f"--gpu {gpu} predicts updates in bf16 alone: leave out --engine.dtype {config.engine.dtype}")
    if not (isinstance(config, DistillConfig) and config.teacher):
        average = config.train.ema > 0
        stages["teacher"] = _job(config, dtype, device, config.train.batch_size, Denoise.cost, average=average)
    elif config.convert:
        stages["conversion"] = _job(
            config, dtype, device, config.batch_size, Reparameterize.cost, average=config.train.ema > 0
        )
    for name, cost in costs.items():
        assert isinstance(config, DistillConfig)
        stages[name] = _job(config, dtype, device, config.batch_size, cost, average=config.ema > 0)
    return stages


def _print_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for column in reversed(list(columns.values())) for name in column))
    print(f"{title:<32}" + "".join(f"{stage:>12}" for stage in columns))
    for name in names:
        cells = (f"{column[name]:>12,.1f}" if name in column else f"{'-':>12}" for column in columns.values())
        print(f"  {name:<30}" + "".join(cells))


def _print_memory(stages: Mapping[str, Job]) -> None:
    """What `cost.memory` says."""
    columns = {}
    for name, job in stages.items():
        items = {item: count / 1e6 for item, count in memory(job).items()}
        columns[name] = items | {"in all": sum(items.values())}
    _print_table("memory of a process, MB", columns)


def _print_communication(stages: Mapping[str, Job]) -> None:
    """What `cost.communication` says, and the time that it takes where nothing else is waited for."""
    columns = {}
    for name, job in stages.items():
        sent = communication(job)
        total = sum(sent.values())
        columns[name] = {item: count / 1e6 for item, count in sent.items()} | {
            f"ms at {WITHIN / 1e9:.0f} GB/s (NVLink)": 1e3 * total / WITHIN,
            f"ms at {BETWEEN / 1e9:.0f} GB/s (400 Gbit/s)": 1e3 * total / BETWEEN,
        }
    _print_table("sent by a process, MB an update", columns)


def _print_prediction(gpu: Gpu, stages: Mapping[str, Job]) -> None:
    """What `gpu.seconds_of_update` says."""
    columns = {}
    for name, job in stages.items():
        kinds = {kind: 1e3 * seconds for kind, seconds in seconds_of_update(gpu, job).items()}
        columns[name] = kinds | {"in all": sum(kinds.values())}
    print()
    _print_table(f"predicted for {gpu.title}, ms/update", columns)


def _device_and_forward(config: RunConfig, device: torch.device, gpu: Gpu | None, job: Job) -> tuple[str, float]:
    """Return what is said of the device, and seconds of a forward of one image in one process."""
    if gpu is None:
        forward = seconds_a_forward(config.network, job.dtype, job.micro_batch, device)
        said = f"{device}: {{}}, measured"
    else:
        forward = predicted_forward(gpu, job)
        if is_counted(config.network):
            how = "from counted operations and bytes, at rates that were fitted to"
        else:
            how = f"at {OF_PEAK:.0%} of the peak, since of this network operations alone are counted; fitted to"
        said = f"{gpu.title}: {{}}, predicted and not measured: {how} {FITTED}"
        said += "; communication is not in its times" if job.processes > 1 else ""
    rate = parameters_and_flops(config.network)[1] / forward
    shown = f"{rate / 1e9:.3g} GFLOP/s" if gpu is None else f"{rate / 1e12:.3g} TFLOP/s"
    return said.format(f"{forward * 1e3:.3g} ms a forward and image ({shown})"), forward


def _print_machine(config: RunConfig, device: torch.device, gpu: GpuName | None, stages: Mapping[str, Job]) -> _Pace:
    """Network, engine, memory and communication; returns the pace of the job."""
    parameters, flops = parameters_and_flops(config.network)
    main = list(stages.values())[-1]
    copies = f"{main.copies} cop{'y' if main.copies == 1 else 'ies'} of the network in {main.shards} part{'s' * (main.shards > 1)}"
    kept = "blocks run again in the backward" if main.recompute else "all activations kept"
    an_image = activation_bytes(main.network, main.dtype, main.recompute, main.fused) / 1e6
    teacher = ", teacher in parts" if main.teacher_sharded else ""
    print(
        f"network      {parameters:,} parameters, {flops / 1e9:.3g} GFLOP a forward and image, predicts {config.network.prediction}"
    )
    print(
        f"engine       {main.processes} process{'es' * (main.processes > 1)}, {copies}; {str(main.dtype).removeprefix('torch.')}, "
        f"micro-batches of {main.micro_batch} images, {kept} ({an_image:.3g} MB an image with {'fused' if main.fused else 'PyTorch'} operations){teacher}"
    )
    of_gpu = None if gpu is None else GPUS[gpu]
    said, forward = _device_and_forward(config, device, of_gpu, main)
    print(f"device       {said}\n")
    _print_memory(stages)
    if main.processes > 1:
        print()
        _print_communication(stages)
    if of_gpu:
        _print_prediction(of_gpu, stages)
    time_column = "predicted" if of_gpu else "time"
    print(
        f"\n{'stage':<12} {'updates':>10} {'images':>14} {'network evals':>16} {'cost, F':>18} {time_column:>12}   "
        "(F: a forward of one image; with its backward, 3)"
    )
    return _Pace(forward / main.processes, of_gpu)


def _print_row(name: str, updates: int, images: int, evaluations: float, cost: float, forward: float) -> float:
    """Print a row of the table; return its seconds. forward: those of one."""
    print(
        f"{name:<12} {updates:>10,} {images:>14,} {round(evaluations):>16,} {round(cost):>18,} {clock(cost * forward):>12}"
    )
    return cost * forward


def _print_stage(name: str, updates: int, job: Job, pace: _Pace) -> float:
    """Print the row of a stage; return its seconds."""
    images = updates * job.batch_size
    return _print_row(name, updates, images, job.cost.evaluations * images, job.cost.flops * images, pace.of(job))


def print_training_plan(config: TrainConfig, device: torch.device, gpu: GpuName | None = None) -> None:
    """Print the plan of `pdfast.train`, predicted for a GPU where one is named."""
    if not is_rank0():
        return
    stages = _stages(config, device, gpu)
    print(f"plan of {config.run}: a teacher for {config.data}")
    pace = _print_machine(config, device, gpu, stages)
    seconds = _print_stage("teacher", config.train.updates, stages["teacher"], pace)
    expected = pace.said(f"expected time {clock(seconds)}")
    print(f"\n{expected}, and the evaluation of {config.evaluation.num_samples:,} images")


def print_distillation_plan(
    config: DistillConfig, method_of: MethodOfRound, device: torch.device, gpu: GpuName | None = None
) -> None:
    """Print the plan of `pdfast.distill` with those methods, predicted for a GPU where one is named."""
    if not is_rank0():
        return
    costs = {steps: method_of(config, steps).round_cost(config, steps) for steps in config.round_steps}
    different = list(dict.fromkeys(costs.values()))
    names = {cost: "rounds" if len(different) == 1 else f"to {_first(costs, cost)}" for cost in different}
    stages = _stages(config, device, gpu, {name: cost for cost, name in names.items()})
    print(
        f"plan of {config.run}: {config.rounds} rounds, {config.start_steps} -> {config.end_steps} steps, on {config.data}"
    )
    pace = _print_machine(config, device, gpu, stages)
    config = with_updates(config, method_of, lambda: pace.of(list(stages.values())[-1]))
    total = 0.0
    for name, updates in (("teacher", config.train.updates), ("conversion", config.convert_updates)):
        if name in stages:
            total += _print_stage(name, updates, stages[name], pace)
    for steps, cost in costs.items():
        if before := method_of(config, steps).evaluations_before(config, steps):
            total += _print_row("pairs", 0, cost.kept_targets, before, before, pace.forward)
        total += _print_stage(count_steps(steps), config.updates_at(steps), stages[names[cost]], pace)
    evaluated = [n for n in config.round_steps if n <= config.evaluation.max_steps]
    drawn = sum(evaluated or config.round_steps)  # by the students, and as much by the teacher
    by_teacher = config.forwards_of(config.first_steps) * (config.first_steps + drawn)
    draws = (by_teacher + drawn) * config.evaluation.num_samples
    evaluation = _print_row("evaluation", 0, 0, draws, draws, pace.forward)
    expected = pace.said(f"expected time {clock(total + evaluation)}")
    print(f"\n{expected} (training {clock(total)}, evaluation {clock(evaluation)})")


def _first(costs: Mapping[int, UpdateCost], cost: UpdateCost) -> int:
    """Return the first step count whose round has that cost."""
    return next(steps for steps, c in costs.items() if c == cost)
