"""The common part of methods that distill a teacher into a student of fewer steps, round after round."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pdfast.config import DistillConfig
from pdfast.diffusion import StepTable, build_step_table, map_condition
from pdfast.engine import parallelize
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.log import RunLog
from pdfast.engine.loop import Method, Optimization, Stage
from pdfast.engine.machine import Machine
from pdfast.io.errors import RunError
from pdfast.loss import identity
from pdfast.networks import Network
from pdfast.networks.guided import Guided, GuidedConfig

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How near a student's output must be to its teacher's before the first update, of the largest value."""
COMPARED_IMAGES = 8  # of each process

Weights = Callable[[int], Mapping[str, Tensor]]
"""Returns the weights, whole tensors on the CPU, of the run's model of a step count: the teacher, or an earlier student."""


@dataclass(frozen=True)
class Networks:
    """The networks of all rounds, whose weights each round writes: laid out once, so that compiled code stays valid."""

    student: Network
    teacher: Network

    @classmethod
    def prepare(cls, config: DistillConfig, machine: Machine) -> "Networks":
        """Lay both out on the machine."""
        return cls(machine.prepare_student(config.student_network.build()), machine.prepare_teacher())


class RoundTable:
    """The step table of the current round, in tensors that serve all rounds of a method."""

    def __init__(self, largest: StepTable) -> None:
        """largest: the table of the round with the most rows, on the device."""
        self.rows = largest
        self.count = torch.full((), len(largest), dtype=torch.int64, device=largest.phi.device)
        """Rows of the current round: int64 []."""

    def takes(self, table: StepTable) -> bool:
        """Tell whether a round may have that table after the one that there is: one of as many parts a step, and not more rows."""
        now = self.rows
        return (table.prediction, table.parts, table.last_by_average) == (
            now.prediction,
            now.parts,
            now.last_by_average,
        ) and len(table) <= len(now)

    def set(self, table: StepTable) -> None:
        """Begin a round: rows past its last are left, and not used. ValueError for a table that it does not take."""
        if not self.takes(table):
            raise ValueError(
                f"a round that predicts {table.prediction!r} after one that predicts {self.rows.prediction!r}, by {table.parts} parts "
                f"a step after {self.rows.parts}, in {len(table)} rows after {len(self.rows)}"
            )
        for column, values in zip(self.rows.columns(), table.columns(), strict=True):
            column[: len(values)] = values
        self.count.fill_(len(table))


def images_at_steps(batch: TrainingBatch, table: RoundTable) -> tuple[Tensor, Tensor, Tensor]:
    """Return step indices k [n], uniform over the table's rows, the angle [n] of each, and the images there."""
    k = batch.step_indices(table.count)
    phi = table.rows.phi[k - 1]
    return k, phi, batch.diffused(phi)


class Distillation(Method):
    """A student that starts each round with the weights of the model before. A subclass sets `cost`, or defines `round_cost`, and
    defines `targets` and `losses`. One object serves consecutive rounds whose tables are of one shape."""

    phase = "distill"
    config: DistillConfig
    machine: Machine
    huber: float = 0.0
    """Above it errors count linearly; 0 squares all."""
    teacher: Network
    """What is asked for targets: the network with the weights of the model before, guided where that is."""

    def __init__(
        self, student: Network, teacher: Network, table: RoundTable, run: Callable[[Callable], Callable] = identity
    ) -> None:
        """run: what compiles the functions around the networks."""
        self.student, self.teacher, self.table, self._run = student, teacher, table, run
        self._network = teacher

    @classmethod
    def open(
        cls,
        config: DistillConfig,
        machine: Machine,
        networks: Networks | None = None,
        table: StepTable | None = None,
    ) -> Self:
        """Return the method for the rounds of a run that begin with this table, by default from the first round on."""
        networks = networks or Networks.prepare(config, machine)
        table = cls.step_table(config, config.round_steps[0]) if table is None else table
        rows = RoundTable(table.to(machine.world.device))
        method = cls(networks.student, networks.teacher, rows, machine.compile_function)
        method.config, method.machine, method.huber = config, machine, cls.huber_of(config)
        return method

    @classmethod
    def huber_of(cls, config: DistillConfig) -> float:
        """Return above which error those of this method count linearly."""
        return config.huber

    @classmethod
    def optimization(cls, config: DistillConfig) -> Optimization:
        """Return how the student is optimized."""
        return Optimization.of_rounds(config)

    @classmethod
    def step_table(cls, config: DistillConfig, steps: int) -> StepTable:
        """Return the table, on the CPU, of the round to a student of so many steps. ValueError for a schedule or steps that it cannot
        have."""
        factor = config.steps_before(steps) // steps
        schedule, prediction = config.schedule.build(), config.network.prediction
        return build_step_table(schedule, steps, prediction, config.weighting, factor=factor)

    @classmethod
    def models(cls, config: DistillConfig, steps: int) -> list[int]:
        """Return the step counts of the models that the round to so many steps takes weights from."""
        return [config.steps_before(steps)]

    @classmethod
    def round_cost(cls, config: DistillConfig, steps: int) -> UpdateCost:
        """Return what an update of the round to so many steps costs."""
        return cls.cost

    def asks(self, steps: int) -> Network:
        """Return the teacher's network as the model of a step count in the plan is asked: guided, where it is the run's first teacher
        and that is."""
        if self.config.forwards_of(steps) == 1:
            return self._network
        guidance = self.config.guidance_range
        assert guidance is not None
        return Guided(GuidedConfig(self.config.asked_network, guidance), self._network)

    @classmethod
    def share(cls, steps: int) -> float:
        """Return how many updates the round to so many steps gets of a budget, next to one to one step: a student needs more, the
        fewer steps it has, and with many a twelfth of that is enough (docs/recipes.md, halving)."""
        return max(1 / steps, 1 / 12)

    @classmethod
    def evaluations_before(cls, config: DistillConfig, steps: int) -> int:
        """Return the forwards of the network that the round takes before its first update."""
        return 0

    def serves(self, steps: int, table: StepTable) -> bool:
        """Tell whether what was made for the rounds before, with code compiled and graphs recorded, serves the round to so many steps."""
        guided = self.config.forwards_of(self.config.steps_before(steps)) > 1
        return self.table.takes(table) and guided == isinstance(self.teacher, Guided)

    def start_from(self, steps: int, table: StepTable, weights: Weights, batch: TrainingBatch) -> None:
        """Begin the round to so many steps: give the networks their weights, and set the round's table."""
        before = weights(self.config.steps_before(steps))
        for network in (self.student, self._network):
            parallelize.set_weights(network, before, batch.world)
        self.teacher = self.asks(self.config.steps_before(steps))
        self.table.set(table)
        self.cost = self.round_cost(self.config, steps)

    def begin(self, batch: TrainingBatch, stage: Stage, log: RunLog) -> None:
        """Raise a RunError unless student and teacher say the same of the first images."""
        batch.load(stage.round_index, 0)
        if batch.world.any(self._differ(batch))[0]:
            raise RunError(f"before {stage.title} the student is not its teacher: this is a bug, report it")

    @torch.no_grad()
    def _differ(self, batch: TrainingBatch) -> bool:
        """Tell whether their outputs, without guidance around, differ for a few images. Neither compiled nor with a gradient: beside the CUDA graph of the
        round before there is no memory for another update."""
        phi = self.table.rows.phi[batch.step_indices(self.table.count) - 1]
        few = slice(min(COMPARED_IMAGES, len(phi)))
        cond = map_condition(lambda tensor: tensor[few], batch.cond)
        z = batch.diffused(phi)[few]
        with torch.compiler.set_stance("force_eager"):
            theirs, ours = (network(z, phi[few], cond) for network in (self._network, self.student))
        return bool((ours - theirs).abs().max() > TOLERANCES[self.student.dtype] * theirs.abs().max())
