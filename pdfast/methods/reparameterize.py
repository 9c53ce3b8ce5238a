"""Training of a v-predicting copy of a teacher that predicts x or eps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdfast.diffusion import natural_angle, to_v
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.loop import Method, Targets
from pdfast.engine.throughput import BUCKETS
from pdfast.loss import identity
from pdfast.networks import Network
from pdfast_kernels import weighted_loss


class Reparameterize(Method):
    """The error of the copy's v: from its original's at the angles `regular`, between which that says what v is; from the true v,
    as in Algorithm 1, at the rest of [0, end], where half of the images are."""

    phase = "teacher"
    cost = UpdateCost(teacher_forwards=1)

    def __init__(
        self,
        copy: Network,
        original: Network,
        regular: tuple[float, float],
        end: float,
        run: Callable[[Callable], Callable] = identity,
    ) -> None:
        """regular, end: angles in radians; run: what compiles the functions around the network."""
        self.student, self._original, self._regular, self._end, self._run = copy, original, regular, end, run
        self._buckets = torch.full((), BUCKETS, device=next(copy.parameters()).device)

    def targets(self, batch: TrainingBatch) -> Targets:
        (low, high), end, times = self._regular, self._end, batch.times()
        u = 2 * times
        # The regular angles for u < 1; for more what is below them, then what is above.
        rest = (u - 1) * (end - (high - low))
        phi = torch.where(u < 1, low + u * (high - low), torch.where(rest < low, rest, rest + (high - low)))
        z, target = batch.diffused(phi), batch.diffused(natural_angle("v", phi))
        phi = phi.float()
        with torch.no_grad():
            theirs = to_v(self._original.prediction, self._original(z, phi, batch.cond), z, phi)
        target = torch.where((u < 1).view(-1, *(1,) * (z.dim() - 1)), theirs, target)
        return Targets((z, phi, batch.cond, target), 1 + (times * BUCKETS).long(), self._buckets)

    def losses(self, z: Tensor, phi: Tensor, cond: Any, target: Tensor) -> Tensor:
        one = torch.ones_like(phi)
        return self._run(weighted_loss)(self.student(z, phi, cond), target, one[:, None], one)
