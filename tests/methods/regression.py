"""A method of one's own: plain regression onto the teacher's output.

python -m tests.methods.regression FLAGS, with those of pdfast.distill
"""

import functools

import torch
from torch import Tensor

from pdfast.cli import run_command
from pdfast.distill import main
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.loop import Targets
from pdfast.methods.distillation import Distillation, images_at_steps


class Regression(Distillation):
    cost = UpdateCost(teacher_forwards=1)

    def targets(self, batch: TrainingBatch) -> Targets:
        k, phi, z = images_at_steps(batch, self.table)
        with torch.no_grad():
            theirs = self.teacher(z, phi, batch.cond) + 0.1  # else there were nothing to learn
        return Targets((z, phi, batch.cond, theirs), k, self.table.count)

    def losses(self, z: Tensor, phi: Tensor, cond: Tensor | None, theirs: Tensor) -> Tensor:
        return (self.student(z, phi, cond) - theirs).square().flatten(1).mean(1)


if __name__ == "__main__":
    run_command(functools.partial(main, Regression))
