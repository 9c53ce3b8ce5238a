"""Progressive Distillation (Algorithm 2 of Salimans & Ho 2022): one student step lands where several DDIM steps of the teacher do."""

from typing import Any

from torch import Tensor

from pdfast.config import DistillConfig
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.loop import Targets
from pdfast.loss import check_predictions, student_losses, teacher_outputs
from pdfast.methods.distillation import Distillation, images_at_steps


class Progressive(Distillation):
    """Algorithm 2: the weighted error of one student step from the teacher's steps to the same angle, two of them where the step
    count is halved. The teacher sees the whole batch."""

    @classmethod
    def round_cost(cls, config: DistillConfig, steps: int) -> UpdateCost:
        before = config.steps_before(steps)
        return UpdateCost(teacher_forwards=before // steps * config.forwards_of(before))

    def targets(self, batch: TrainingBatch) -> Targets:
        rows = self.table.rows
        check_predictions(rows, student=self.student, teacher=self.teacher)
        k, phi, z = self._run(images_at_steps)(batch, self.table)
        index = k - 1
        start, first, second = teacher_outputs(
            self.teacher, z, rows, index, batch.cond, self._run, average=self.average
        )
        return Targets((z, phi, batch.cond, start, first, second, index), k, self.table.count)

    def losses(self, z: Tensor, phi: Tensor, cond: Any, *target: Tensor) -> Tensor:
        start, first, second, index = target
        output = self.student(z, phi, cond)
        return student_losses(output, start, first, second, self.table.rows, index, self._run, self.huber)
