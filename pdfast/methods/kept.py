"""Targets that are made ahead and kept: those of Progressive Distillation for several updates, and pairs for whole rounds.

What a network is to learn depends on the image, its noise and the row of the step table alone, so that it can serve more than one
update. Each process keeps the targets of its own places in the global batch, as many a place as there are batches of them. In each
pass over all of them a place takes each of its targets once, beginning anywhere, so that batches are composed anew. Neither the
number of processes nor a resume changes what is trained on: targets are made again, and are the same.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from pdfast.config import DistillConfig, PairsOrigin
from pdfast.diffusion import StepTable, angles, build_landing_table, map_condition, noise, tensors_of, trajectory
from pdfast.diffusion.noise import Stream
from pdfast.engine import parallelize
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.log import RunLog
from pdfast.engine.loop import RESUME_HINT, Stage, Targets
from pdfast.io.errors import Interrupted
from pdfast.io.text import count_steps
from pdfast.loss import combined_target
from pdfast.methods.distillation import Distillation, Weights
from pdfast.methods.progressive import Progressive
from pdfast_kernels import ddim_step, weighted_loss


def count_batches(config: DistillConfig) -> int:
    """Return how many global batches of targets are kept."""
    return -(-config.kept.count // config.batch_size)


class _Store:
    """A tree of tensors, written in parts, in memory that is allocated once: dense, images with their channels last."""

    def __init__(self, count: int) -> None:
        """count: of rows."""
        self._count, self._tree = count, None

    def write(self, rows: slice, tree: Any) -> None:
        """Write trees of tensors, which begin with as many rows."""
        if self._tree is None:
            self._tree = map_condition(lambda t: t.new_empty(self._count, *_channels_last(t).shape[1:]), tree)
        for kept, given in zip(tensors_of(self._tree), tensors_of(tree), strict=True):
            kept[rows] = _channels_last(given)

    def read(self, index: Tensor) -> Any:
        """Return the rows of an index, int64 [n]."""

        def rows(kept: Tensor) -> Tensor:
            found = kept[index]
            return found.permute(0, 3, 1, 2) if found.dim() == 4 else found

        return map_condition(rows, self._tree)


def _channels_last(values: Tensor) -> Tensor:
    return values.permute(0, 2, 3, 1) if values.dim() == 4 else values


class _Kept(Distillation):
    """What both have in common: the places, and the weighted error of the student's output from a kept target."""

    _index: Tensor | None = None
    """Which of the kept targets the samples of this update take: int64 [n]."""

    @property
    def _batches(self) -> int:
        return count_batches(self.config)

    def _choose(self, batch: TrainingBatch, stage: Stage, update: int) -> None:
        turn, at = divmod(update, self._batches)
        first = noise.integer(noise.key(batch.seed, Stream.KEPT, stage.round_index, turn), batch.index, self._batches)
        places = torch.arange(len(batch.index), device=first.device)
        index = (first + at) % self._batches * len(places) + places
        if self._index is None:
            self._index = index
        self._index.copy_(index)

    def losses(self, z: Tensor, phi: Tensor, cond: Any, *error: Tensor) -> Tensor:
        return self._run(weighted_loss)(self.student(z, phi, cond), *error, self.huber)


class KeptProgressive(_Kept, Progressive):
    """Progressive Distillation with targets each of which serves `kept.reuse` updates."""

    _made: tuple[int, int] | None = None  # in which round, and how often targets had been made in it before
    _store: _Store | None = None

    @classmethod
    def round_cost(cls, config: DistillConfig, steps: int) -> UpdateCost:
        each = super().round_cost(config, steps).teacher_forwards
        return UpdateCost(each / config.kept.reuse, kept_targets=count_batches(config) * config.batch_size)

    def load(self, batch: TrainingBatch, stage: Stage, update: int) -> None:
        made = stage.round_index, update // (self._batches * self.config.kept.reuse)
        if self._made != made:
            self._make(batch, *made)
            self._made = made
        self._choose(batch, stage, update)

    def _make(self, batch: TrainingBatch, round_index: int, before: int) -> None:
        place = len(batch.index)
        self._store = self._store or _Store(self._batches * place)
        for i in range(self._batches):
            self.machine.watchdog.beat("the making of targets")
            batch.load(round_index, before * self._batches + i)
            z, _, cond, start, first, second, index = super().targets(batch).given
            target = self._run(combined_target)(start, first, second, self.table.rows, index)
            self._store.write(slice(i * place, (i + 1) * place), (z, target, index, cond))

    def targets(self, batch: TrainingBatch) -> Targets:
        assert self._store is not None and self._index is not None
        rows, (z, target, index, cond) = self.table.rows, self._store.read(self._index)
        given = z, rows.phi[index], cond, target, rows.output[index], rows.weight[index]
        return Targets(given, index + 1, self.table.count)


class Pairs(_Kept):
    """Noise and what a model of n steps makes of it (Luhman & Luhman 2021), with the states between at the ends of the student's
    steps: drawn once, and shared by consecutive rounds. The student's step is to lead from each state to the next."""

    _states: _Store | None = None
    _conditions: _Store
    _origin: PairsOrigin
    _stride: Tensor
    """Kept states in one of the student's steps: int64 []."""

    @classmethod
    def huber_of(cls, config: DistillConfig) -> float:
        return config.kept.huber

    @classmethod
    def step_table(cls, config: DistillConfig, steps: int) -> StepTable:
        return build_landing_table(config.schedule.build(), steps, config.network.prediction, config.weighting)

    @classmethod
    def models(cls, config: DistillConfig, steps: int) -> list[int]:
        return [*super().models(config, steps), config.pairs_at(steps).model]

    @classmethod
    def round_cost(cls, config: DistillConfig, steps: int) -> UpdateCost:
        kept = count_batches(config) * config.batch_size
        return UpdateCost(0, kept_targets=kept, tensors_a_target=1 + config.pairs_at(steps).finest)

    @classmethod
    def share(cls, steps: int) -> float:
        return steps**-0.5

    @classmethod
    def evaluations_before(cls, config: DistillConfig, steps: int) -> int:
        origin = config.pairs_at(steps)
        each = origin.steps * config.forwards_of(origin.model)
        return count_batches(config) * config.batch_size * each if steps == origin.finest else 0

    def serves(self, steps: int, table: StepTable) -> bool:
        return self.table.takes(table)  # the teacher is asked before the first round

    def start_from(self, steps: int, table: StepTable, weights: Weights, batch: TrainingBatch) -> None:
        parallelize.set_weights(self.student, weights(self.config.steps_before(steps)), batch.world)
        if self._states is None:
            self._stride = torch.zeros_like(self.table.count)
            self._origin = self.config.pairs_at(steps)
            parallelize.set_weights(self._network, weights(self._origin.model), batch.world)
            self.teacher = self.asks(self._origin.model)
        self.table.set(table)
        self.cost = self.round_cost(self.config, steps)
        self._stride.fill_(self._origin.finest // steps)

    def begin(self, batch: TrainingBatch, stage: Stage, log: RunLog) -> None:
        """Draw the pairs, unless a round before has. Raises Interrupted where the run was asked to stop."""
        if self._states is not None:
            return
        origin, count, place = self._origin, self._batches * batch.batch_size, len(batch.index)
        log.say(f"drawing {count:,} pairs in {count_steps(origin.steps)} of the model of {count_steps(origin.model)}")
        each, every = origin.finest + 1, origin.steps // origin.finest
        states, self._conditions = _Store(self._batches * place * each), _Store(self._batches * place)
        path, network = angles(self.config.schedule.build(), origin.steps), self.config.student_network
        for i in range(self._batches):
            index = i * batch.batch_size + batch.index
            z = noise.normal(noise.key(batch.seed, Stream.PAIR), index, network.image_shape)
            cond = network.draw_condition(batch.seed, index)
            self._conditions.write(slice(i * place, (i + 1) * place), cond)
            drawn = itertools.chain([z], trajectory(self.teacher, z, path, order=origin.order, cond=cond))
            for step, state in enumerate(drawn):
                if step % every == 0:
                    first = i * place * each + step // every
                    states.write(slice(first, first + place * each, each), state)
                if self.machine.asked_to_stop("the drawing of pairs"):
                    raise Interrupted(f"stopped; {RESUME_HINT}")  # they are drawn again
        self._states = states

    def load(self, batch: TrainingBatch, stage: Stage, update: int) -> None:
        batch.set_keys(stage.round_index, update)
        self._choose(batch, stage, update)

    def targets(self, batch: TrainingBatch) -> Targets:
        assert self._states is not None and self._index is not None
        rows, k = self.table.rows, batch.step_indices(self.table.count)
        index, end = k - 1, (self._index + 1) * (self._origin.finest + 1) - 1 - (k - 1) * self._stride
        z, z_end = self._states.read(end - self._stride), self._states.read(end)
        target = self._run(ddim_step)(z, z_end, rows.target_z, rows.target_output[0], index)
        given = z, rows.phi[index], self._conditions.read(self._index), target, rows.output[index], rows.weight[index]
        return Targets(given, k, self.table.count)
