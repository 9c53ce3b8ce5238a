"""Transitive closure time-distillation (TRACT; Berthelot et al. 2023), and with a list of grids multistep consistency."""

from collections.abc import Sequence
from typing import Self

from pdfast.config import DistillConfig
from pdfast.diffusion import StepTable, build_closure_table
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.loop import Stage
from pdfast.engine.machine import Machine
from pdfast.methods.distillation import Networks, Weights
from pdfast.methods.progressive import Progressive


class Tract(Progressive):
    """From any point of the teacher's grid: one teacher step, then the EMA of the student to the end of the student's step.

    With `tract.grids` a round goes through several numbers of the teacher's steps (multistep consistency models, Heek et al. 2024):
    each for an equal share of the updates, where the paper lets the number grow gradually. Of the paper's, adjusted DDIM is left
    out, and the target is the EMA's (the student's own, for a decay of 0).
    """

    _tables: Sequence[StepTable] = ()

    @classmethod
    def open(
        cls,
        config: DistillConfig,
        machine: Machine,
        networks: Networks | None = None,
        table: StepTable | None = None,
    ) -> Self:
        method = super().open(config, machine, networks, table)
        method.average = machine.prepare_student(config.student_network.build()).eval().requires_grad_(False)
        return method

    @classmethod
    def grids(cls, config: DistillConfig, steps: int) -> tuple[int, ...]:
        """Return the numbers of teacher steps that the round to so many steps goes through."""
        return config.tract.grids or (config.steps_before(steps),)

    @classmethod
    def _table(cls, config: DistillConfig, grid: int, steps: int) -> StepTable:
        schedule, prediction = config.schedule.build(), config.network.prediction
        return build_closure_table(schedule, grid, steps, prediction, config.weighting)

    @classmethod
    def step_table(cls, config: DistillConfig, steps: int) -> StepTable:
        """Return the table of the finest grid."""
        return cls._table(config, max(cls.grids(config, steps)), steps)

    @classmethod
    def round_cost(cls, config: DistillConfig, steps: int) -> UpdateCost:
        return UpdateCost(teacher_forwards=1 + config.forwards_of(config.steps_before(steps)), fast_average=True)

    def start_from(self, steps: int, table: StepTable, weights: Weights, batch: TrainingBatch) -> None:
        super().start_from(steps, table, weights, batch)
        grids = self.grids(self.config, steps)
        self._tables = [self._table(self.config, grid, steps) for grid in grids]

    def load(self, batch: TrainingBatch, stage: Stage, update: int) -> None:
        super().load(batch, stage, update)
        if len(self._tables) > 1:
            self.table.set(self._tables[update * len(self._tables) // stage.updates])
