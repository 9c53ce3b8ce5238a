"""Consistency distillation with the loss of latent consistency models (Luo et al. 2023), to compare with: not a method of pdfast.

    python -m benchmarks.consistency FLAGS        those of pdfast.distill, with --method tract --tract.grids 64 --tract.ema 0.95

From any point of the teacher's grid one DDIM step of the teacher; the student's x there is to be what its EMA says of x after the step,
by the pseudo-Huber loss. That is transitive closure to one step with another loss. Their c_skip and c_out hold x at the image to z, which
v-prediction does by itself. For networks that predict v.
"""

import functools
from typing import Any

from torch import Tensor

from pdfast.cli import run_command
from pdfast.diffusion import to_x
from pdfast.distill import main
from pdfast.loss import combined_target
from pdfast.methods import Tract

HUBER = 0.001


class Consistency(Tract):
    """The loss of latent consistency models on the targets of transitive closure."""

    def losses(self, z: Tensor, phi: Tensor, cond: Any, *target: Tensor) -> Tensor:
        start, first, second, index = target
        said = to_x("v", self.student(z, phi, cond), z, phi)
        wanted = to_x("v", combined_target(start, first, second, self.table.rows, index), z, phi)
        return (((said - wanted).square() + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)


if __name__ == "__main__":
    run_command(functools.partial(main, Consistency))
