"""Training of a teacher (Algorithm 1 of Salimans & Ho 2022)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdfast.diffusion import (
    Prediction,
    Schedule,
    Weighting,
    natural_angle,
    natural_weight,
    output_coefficient,
)
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import UpdateCost
from pdfast.engine.loop import Method, Targets
from pdfast.engine.throughput import BUCKETS
from pdfast.loss import identity
from pdfast.networks import Network
from pdfast_kernels import weighted_loss


def _noisy_images(batch: TrainingBatch, schedule: Schedule, prediction: Prediction, weighting: Weighting) -> tuple:
    """Return z, its angle [n], what the network is to say of it, the error's coefficient and weight, and buckets of the times."""
    times = batch.times()
    phi = schedule.phi(times)
    z, target = batch.diffused(phi), batch.diffused(natural_angle(prediction, phi))
    coefficient = output_coefficient(prediction, phi).float()
    weight = natural_weight(prediction, weighting, phi).float()
    return z, phi.float(), target, coefficient, weight, 1 + (times * BUCKETS).long()


class Denoise(Method):
    """Algorithm 1: the weighted error of the network's prediction at uniformly drawn times."""

    phase = "teacher"
    cost = UpdateCost(teacher_forwards=0)

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        weighting: Weighting,
        run: Callable[[Callable], Callable] = identity,
        label_dropout: float = 0.0,
    ) -> None:
        """run: what compiles the functions around the network; label_dropout: the fraction of samples that it is not told the class of."""
        self._label_dropout = label_dropout
        self.student, self._schedule, self._weighting, self._run = network, schedule, weighting, run
        self._buckets = torch.full((), BUCKETS, device=next(network.parameters()).device)

    def targets(self, batch: TrainingBatch) -> Targets:
        noisy = self._run(_noisy_images)
        z, phi, target, coefficient, weight, bucket = noisy(
            batch, self._schedule, self.student.prediction, self._weighting
        )
        cond = batch.cond_without(self._label_dropout)
        return Targets((z, phi, cond, target, coefficient, weight), bucket, self._buckets)

    def losses(self, z: Tensor, phi: Tensor, cond: Any, *error: Tensor) -> Tensor:
        return self._run(weighted_loss)(self.student(z, phi, cond), *error)
