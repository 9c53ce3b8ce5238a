"""The losses of one update: the teacher's (Algorithm 1) and the student's (Algorithm 2 of Salimans & Ho 2022).

Every random number is a function of (seed, round, update, index in the batch): see `pdfast.diffusion.noise`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdfast.data import Batch, ImageSource
from pdfast.diffusion import (
    Model,
    Schedule,
    StepTable,
    Weighting,
    natural_angle,
    natural_weight,
    noise,
    output_coefficient,
)
from pdfast.diffusion.noise import Stream
from pdfast_kernels import ddim_step, ddim_step_weighted_loss, diffuse, noise_key, weighted_loss


@dataclass(frozen=True)
class Draws:
    """The data and the random numbers of one update. round_index 0 is the teacher's training."""

    source: ImageSource
    seed: int
    round_index: int
    batch_size: int
    flip: bool
    device: torch.device

    def batch(self, update: int) -> Batch:
        """The images of an update: the next `batch_size` global sample indices of this round."""
        samples = torch.arange(update * self.batch_size, (update + 1) * self.batch_size)
        return self.source.batch(samples, self.seed + (self.round_index << 32))

    @property
    def index(self) -> Tensor:
        return torch.arange(self.batch_size, device=self.device)

    def times(self, update: int) -> Tensor:
        """Diffusion times, uniform in (0, 1): float64 [n]."""
        return noise.uniform(self.seed, Stream.TIME, self.round_index, update, self.index)

    def step_indices(self, update: int, steps: int) -> Tensor:
        """Step indices, uniform in 1..steps: int64 [n]."""
        return 1 + noise.integer(self.seed, Stream.TIME, self.round_index, update, self.index, steps)

    def noise_key(self, update: int) -> Tensor:
        """What `pdfast_kernels.diffuse` draws the update's noise by."""
        return noise_key(self.seed, Stream.NOISE, self.round_index, update, self.device)

    def flips(self, update: int) -> Tensor | None:
        """Which images are flipped: bool [n], or None."""
        if not self.flip:
            return None
        return noise.integer(self.seed, Stream.FLIP, self.round_index, update, self.index, 2).bool()


def teacher_loss(
    model: Model, draws: Draws, update: int, schedule: Schedule, weighting: Weighting, conditional: bool
) -> Tensor:
    """Algorithm 1: the weighted error of the network's prediction at a uniformly drawn time; a scalar."""
    batch, flip, key = draws.batch(update), draws.flips(update), draws.noise_key(update)
    phi = schedule.phi(draws.times(update))
    z = diffuse(batch.images, phi, key, draws.index, flip)
    target = diffuse(batch.images, natural_angle(model.prediction, phi), key, draws.index, flip)
    output = model(z, phi.float(), batch.labels if conditional else None)
    return weighted_loss(
        output,
        target,
        output_coefficient(model.prediction, phi).float(),
        natural_weight(model.prediction, weighting, phi).float(),
    ).mean()


def distillation_loss(
    student: Model, teacher: Model, draws: Draws, update: int, table: StepTable, conditional: bool
) -> Tensor:
    """Algorithm 2: the weighted error of one student step against two DDIM steps of the teacher; a scalar."""
    batch = draws.batch(update)
    cond = batch.labels if conditional else None
    index = draws.step_indices(update, len(table.phi)) - 1
    phi = table.phi[index]
    z = diffuse(batch.images, phi, draws.noise_key(update), draws.index, draws.flips(update))
    with torch.no_grad():
        first = teacher(z, phi, cond)
        z_mid = ddim_step(z, first, table.ddim_z, table.ddim_output, index)
        second = teacher(z_mid, table.phi_mid[index], cond)
    output = student(z, phi, cond)
    return ddim_step_weighted_loss(
        output,
        z,
        first,
        second,
        table.target_z,
        table.target_output,
        table.target_output_mid,
        table.output,
        table.weight,
        index,
    ).mean()
