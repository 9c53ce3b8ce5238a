"""Minutes of training turned into updates: `--minutes`.

The rule divides as the digits' job by halving does (docs/recipes.md): what a student is trained for grows as its step count falls. The
teacher, where it is trained too, gets TEACHER_SHARE; each round gets updates in proportion to 1 / steps, and those to many steps
FEWEST_SHARE of what one step gets.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from pdfast.config import DistillConfig
from pdfast.engine.cost import inputs
from pdfast.engine.machine import Machine
from pdfast.io.errors import UsageError
from pdfast.io.plain import fields_of, structure
from pdfast.io.reading import load_yaml
from pdfast.methods import Denoise, MethodOfRound, Reparameterize

TEACHER_SHARE = 0.43
FEWEST_SHARE = 1 / 12
TIMED, ENOUGH = 5, 20.0
"""Updates that are timed, after the first, which may compile; and seconds after which no other is."""


def with_updates(
    config: DistillConfig,
    method_of: MethodOfRound,
    measure: Callable[[], float],
    on_rank0: Callable[[Callable[[], str | None]], str | None] = lambda read: read(),
) -> DistillConfig:
    """Return the configuration with the updates that its minutes mean: those that the run was begun with, or, where it was not begun,
    by what `measure` says, seconds of a forward of one image on all processes.

    on_rank0: `World.run_on_rank0`, since a machine without the run's folder must not measure while the others go on.
    """
    if config.minutes is None:
        return config
    saved = on_rank0(lambda: _saved_updates(config))
    if saved is None:
        return divide(config, method_of, 60 * config.minutes / measure())
    of_teacher, of_rounds = json.loads(saved)
    return replace(config, train=replace(config.train, updates=of_teacher), updates=of_rounds)


def _saved_updates(config: DistillConfig) -> str | None:
    """Return the updates of a run that was begun, JSON of the teacher's and the rounds'; None where it was not."""
    if not config.folder.is_begun():
        return None
    saved, where = load_yaml(config.folder.config), str(config.folder.config)
    rounds = fields_of(DistillConfig, saved, ("updates",), where)["updates"]
    train = structure(type(config.train), saved.get("train", {}), f"{where}, train")
    return json.dumps([train.updates, rounds])


def divide(config: DistillConfig, method_of: MethodOfRound, forwards: float) -> DistillConfig:
    """Return the configuration with as many updates as cost so many forwards of one image. UsageError where there is time for none."""
    train, left = config.train, forwards
    if config.teacher is None:
        updates = int(TEACHER_SHARE * forwards / (Denoise.cost.flops * train.batch_size))
        train = replace(train, updates=max(updates, 1))
        left -= TEACHER_SHARE * forwards
    elif config.convert:
        left -= config.convert_updates * config.batch_size * Reparameterize.cost.flops
    shares = {steps: max(1 / steps, FEWEST_SHARE) for steps in config.round_steps}
    costs = {steps: config.batch_size * method_of(config, steps).round_cost(config, steps).flops for steps in shares}
    left -= sum(method_of(config, steps).evaluations_before(config, steps) for steps in shares)
    at_one_step = left / sum(shares[steps] * costs[steps] for steps in shares)
    if at_one_step * min(shares.values()) < 1:
        raise UsageError(
            f"--minutes {config.minutes:g} are too few for an update in each of {len(shares)} rounds, and for what is drawn or converted before "
            "them: give more, a shorter --plan, or a smaller --kept.count"
        )
    updates_at = {steps: round(at_one_step * share) for steps, share in shares.items()}
    (_, first), *rest = updates_at.items()
    table = ",".join([str(first), *(f"{steps}:{updates}" for steps, updates in rest if updates != first)])
    return replace(config, train=train, updates=table)


def seconds_of_forward(config: DistillConfig, machine: Machine) -> float:
    """Return seconds of a forward of one image on all processes: a third of what forward and backward take, measured as they are
    trained. All processes must call it, and get the same."""
    batch = config.batch_size // machine.world.size // machine.settings.micro_batches
    network = machine.prepare_student(config.network.build())
    zeros = inputs(config.network, batch, machine.world.device)
    times: list[float] = []
    while len(times) <= TIMED and sum(times) < ENOUGH:
        began = time.perf_counter()
        network(*zeros).square().mean().backward()
        network.zero_grad(set_to_none=True)
        if machine.world.device.type == "cuda":
            torch.cuda.synchronize(machine.world.device)
        times.append(float(max(machine.world.collect(time.perf_counter() - began))))
    return min(times[1:] or times) / (3 * batch * machine.world.size)
