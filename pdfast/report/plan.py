"""What a job will cost, before it is started: `--dry-run`."""

import time

import torch

from pdfast.config import DistillConfig, RunConfig, TrainConfig
from pdfast.engine.cost import activation_bytes, inputs, parameters_and_flops
from pdfast.engine.log import clock, count_steps
from pdfast.networks import NetworkConfig, UNet

TIMED_IMAGES = 8


def seconds_a_forward(network: NetworkConfig, device: torch.device) -> float:
    """Seconds of one forward of one image on the device, measured on a small batch."""
    model = UNet(network).to(device).eval()
    zeros = inputs(network, TIMED_IMAGES, device)

    def run() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            model(*zeros)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    run()
    return min(run() for _ in range(3)) / TIMED_IMAGES


def _print_network(config: RunConfig, device: torch.device, batch_size: int, copies: int) -> float:
    parameters, flops = parameters_and_flops(config.network)
    memory = 4 * parameters * copies + activation_bytes(config.network) * batch_size
    forward = seconds_a_forward(config.network, device)
    print(
        f"network      {parameters:,} parameters, {flops / 1e9:.3g} GFLOP a forward and image, predicts {config.network.prediction}"
    )
    print(f"memory       about {memory / 1e9:.2g} GB for weights, optimizer and activations at batch {batch_size}")
    print(
        f"device       {device}: {forward * 1e3:.3g} ms a forward and image ({flops / forward / 1e9:.3g} GFLOP/s), measured"
    )
    return forward


def _row(name: str, updates: int, images: int, evaluations: int, seconds: float) -> None:
    print(f"{name:<12} {updates:>10,} {images:>14,} {evaluations:>16,} {clock(seconds):>12}")


def _print_teacher(config: RunConfig, forward: float) -> float:
    images = config.train.updates * config.train.batch_size
    seconds = 3 * forward * images
    _row("teacher", config.train.updates, images, images, seconds)
    return seconds


def print_training_plan(config: TrainConfig, device: torch.device) -> None:
    """The plan of `pdfast.train`."""
    print(f"plan of {config.run}: a teacher for {config.data}")
    forward = _print_network(config, device, config.train.batch_size, copies=5)
    print(f"\n{'stage':<12} {'updates':>10} {'images':>14} {'network evals':>16} {'time':>12}")
    total = _print_teacher(config, forward)
    print(f"\nexpected time {clock(total)} and the evaluation of {config.evaluation.num_samples:,} images")


def print_distillation_plan(config: DistillConfig, device: torch.device) -> None:
    """The plan of `pdfast.distill`: an update costs two forwards of the teacher and three forwards' worth of the student."""
    print(
        f"plan of {config.run}: {config.rounds} rounds, {config.start_steps} -> {config.end_steps} steps, on {config.data}"
    )
    forward = _print_network(config, device, config.batch_size, copies=6 if config.ema else 5)
    print(f"\n{'stage':<12} {'updates':>10} {'images':>14} {'network evals':>16} {'time':>12}")
    total = 0.0 if config.teacher else _print_teacher(config, forward)
    for steps in config.round_steps:
        updates = config.updates_at(steps)
        images = updates * config.batch_size
        seconds = 5 * forward * images
        _row(count_steps(steps), updates, images, 3 * images, seconds)
        total += seconds
    judged = [n for n in config.round_steps if n <= config.evaluation.max_steps]
    draws = (config.start_steps + 2 * sum(config.round_steps if not judged else judged)) * config.evaluation.num_samples
    _row("evaluation", 0, 0, draws, draws * forward)
    print(
        f"\nexpected time {clock(total + draws * forward)} (training {clock(total)}, evaluation {clock(draws * forward)})"
    )
