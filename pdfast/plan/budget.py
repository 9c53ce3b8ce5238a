"""Minutes of training turned into updates and pairs: `--minutes`.

The rule divides as the digits' jobs do (docs/recipes.md): the teacher, where it is trained too, gets TEACHER_SHARE; of the rest DRAWN_SHARE
goes into the drawing of pairs, where there are some, and each round gets updates as its method says (`Distillation.share`).
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
DRAWN_SHARE = 0.3
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
    of_teacher, of_rounds, count = json.loads(saved)
    train, kept = replace(config.train, updates=of_teacher), replace(config.kept, count=count)
    return replace(config, train=train, updates=of_rounds, kept=kept)


def _saved_updates(config: DistillConfig) -> str | None:
    """Return what a run was begun with, JSON of the updates of the teacher and of the rounds and the number of targets that are kept;
    None where it was not begun."""
    if not config.folder.is_begun():
        return None
    saved, where = load_yaml(config.folder.config), str(config.folder.config)
    rounds = fields_of(DistillConfig, saved, ("updates",), where)["updates"]
    train = structure(type(config.train), saved.get("train", {}), f"{where}, train")
    kept = structure(type(config.kept), saved.get("kept", {}), f"{where}, kept")
    return json.dumps([train.updates, rounds, kept.count])


def divide(config: DistillConfig, method_of: MethodOfRound, forwards: float) -> DistillConfig:
    """Return the configuration with as many updates and pairs as cost so many forwards of one image. UsageError where there is time for
    none."""
    train, left = config.train, forwards
    if config.teacher is None:
        updates = int(TEACHER_SHARE * forwards / (Denoise.cost.flops * train.batch_size))
        train = replace(train, updates=max(updates, 1))
        left -= TEACHER_SHARE * forwards
    elif config.convert:
        left -= config.convert_updates * config.batch_size * Reparameterize.cost.flops
    config = _with_pairs(config, method_of, DRAWN_SHARE * left)
    shares = {steps: method_of(config, steps).share(steps) for steps in config.round_steps}
    costs = {steps: config.batch_size * method_of(config, steps).round_cost(config, steps).flops for steps in shares}
    left -= _drawing(config, method_of)
    at_one_step = left / sum(shares[steps] * costs[steps] for steps in shares)
    if at_one_step * min(shares.values()) < 1:
        raise UsageError(
            f"--minutes {config.minutes:g} are too few for an update in each of {len(shares)} rounds, and for what is drawn or converted before "
            "them: give more, or a shorter --plan"
        )
    updates_at = {steps: round(at_one_step * share) for steps, share in shares.items()}
    (_, first), *rest = updates_at.items()
    table = ",".join([str(first), *(f"{steps}:{updates}" for steps, updates in rest if updates != first)])
    return replace(config, train=train, updates=table)


def _drawing(config: DistillConfig, method_of: MethodOfRound) -> int:
    """Return the forwards of one image that pairs are drawn in."""
    return sum(method_of(config, steps).evaluations_before(config, steps) for steps in config.round_steps)


def _with_pairs(config: DistillConfig, method_of: MethodOfRound, forwards: float) -> DistillConfig:
    """Return the configuration with as many pairs, in whole batches and one at least, as are drawn in so many forwards."""
    one_batch = replace(config, kept=replace(config.kept, count=config.batch_size))
    if not (cost := _drawing(one_batch, method_of)):
        return config
    batches = max(int(forwards / cost), 1)
    return replace(config, kept=replace(config.kept, count=batches * config.batch_size))


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
