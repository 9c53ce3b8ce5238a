"""The common part of methods that distill a teacher into a student of fewer steps, round after round."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pdfast.config import STEP_FACTOR, DistillConfig
from pdfast.diffusion import StepTable, build_step_table, map_condition
from pdfast.engine import parallelize
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.loop import Method, Optimization, Stage
from pdfast.engine.machine import Machine
from pdfast.io.errors import RunError
from pdfast.loss import identity
from pdfast.networks import Network

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How near a student's output must be to its teacher's before the first update, of the largest value."""
COMPARED_IMAGES = 8  # of each process


class RoundTable:
    """The step table of the current round, in tensors that serve all rounds."""

    def __init__(self, largest: StepTable) -> None:
        """largest: the table of the round with the most rows, on the device."""
        self.rows = largest
        self.count = torch.full((), len(largest), dtype=torch.int64, device=largest.phi.device)
        """Rows of the current round: int64 []."""

    def set(self, table: StepTable) -> None:
        """Begin a round: rows past its last are left, and not used. ValueError for a table of another prediction, or of other parts."""
        if table.prediction != self.rows.prediction:
            raise ValueError(
                f"a round that predicts {table.prediction!r} after one that predicts {self.rows.prediction!r}"
            )
        if (table.parts, table.last_by_average) != (self.rows.parts, self.rows.last_by_average):
            raise ValueError(f"a round of {table.parts} parts a step after one of {self.rows.parts}")
        for column, values in zip(self.rows.columns(), table.columns(), strict=True):
            column[: len(values)] = values
        self.count.fill_(len(table))


def images_at_steps(batch: TrainingBatch, table: RoundTable) -> tuple[Tensor, Tensor, Tensor]:
    """Return step indices k [n], uniform over the table's rows, the angle [n] of each, and the images there."""
    k = batch.step_indices(table.count)
    phi = table.rows.phi[k - 1]
    return k, phi, batch.diffused(phi)


class Distillation(Method):
    """A student that starts each round with its teacher's weights. A subclass sets `cost` and defines `targets` and `losses`."""

    phase = "distill"
    factor: ClassVar[int] = STEP_FACTOR
    """The teacher's steps for one of the student's."""

    def __init__(
        self, student: Network, teacher: Network, table: RoundTable, run: Callable[[Callable], Callable] = identity
    ) -> None:
        """run: what compiles the functions around the networks."""
        self.student, self.teacher, self.table, self._run = student, teacher, table, run

    @classmethod
    def open(cls, config: DistillConfig, machine: Machine) -> "Distillation":
        """Lay out both networks, whose weights are yet to be written, and the table of the round with the most steps."""
        student, teacher = machine.prepare_student(config.network.build()), machine.prepare_teacher()
        table = RoundTable(cls.step_table(config, config.round_steps[0], machine.world.device))
        return cls(student, teacher, table, machine.compile_function)

    @classmethod
    def optimization(cls, config: DistillConfig) -> Optimization:
        """Return how the student is optimized."""
        return Optimization.of_rounds(config)

    @classmethod
    def step_table(cls, config: DistillConfig, steps: int, device: torch.device) -> StepTable:
        """Return the table of the round to a student of so many steps."""
        schedule, prediction = config.schedule.build(), config.network.prediction
        return build_step_table(schedule, steps, prediction, config.weighting, device=device, factor=cls.factor)

    def start_from(self, weights: Mapping[str, Tensor], table: StepTable, batch: TrainingBatch) -> None:
        """Give both networks the weights, whole tensors on the CPU, and set the round's table."""
        for network in (self.student, self.teacher):
            parallelize.set_weights(network, weights, batch.world)
        self.table.set(table)

    def begin(self, batch: TrainingBatch, stage: Stage) -> None:
        """Raise a RunError unless student and teacher say the same of the first images."""
        batch.load(stage.round_index, 0)
        if batch.world.any(self._differ(batch))[0]:
            raise RunError(f"before {stage.title} the student is not its teacher: this is a bug, report it")

    @torch.no_grad()
    def _differ(self, batch: TrainingBatch) -> bool:
        """Tell whether their outputs differ for a few images. Neither compiled nor with a gradient: beside the CUDA graph of the
        round before there is no memory for another update."""
        phi = self.table.rows.phi[batch.step_indices(self.table.count) - 1]
        few = slice(min(COMPARED_IMAGES, len(phi)))
        cond = map_condition(lambda tensor: tensor[few], batch.cond)
        z = batch.diffused(phi)[few]
        with torch.compiler.set_stance("force_eager"):
            theirs, ours = (network(z, phi[few], cond) for network in (self.teacher, self.student))
        return bool((ours - theirs).abs().max() > TOLERANCES[self.student.dtype] * theirs.abs().max())
