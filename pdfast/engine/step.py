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
    natural_target,
    natural_weight,
    noise,
    output_coefficient,
)
from pdfast.diffusion.noise import Stream
from pdfast_kernels import ddim_step, ddim_step_weighted_loss, diffuse, weighted_loss


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

    def noise(self, update: int) -> Tensor:
        """eps ~ N(0, 1): float32 [n, C, H, W]."""
        height, width, channels = self.source.shape
        return noise.normal(self.seed, Stream.NOISE, self.round_index, update, self.index, (channels, height, width))

    def flips(self, update: int) -> Tensor | None:
        """Which images are flipped: bool [n], or None."""
        if not self.flip:
            return None
        return noise.integer(self.seed, Stream.FLIP, self.round_index, update, self.index, 2).bool()


def teacher_loss(
    model: Model, draws: Draws, update: int, schedule: Schedule, weighting: Weighting, conditional: bool
) -> Tensor:
    """Algorithm 1: the weighted error of the network's prediction at a uniformly drawn time; a scalar."""
    batch, eps, flip = draws.batch(update), draws.noise(update), draws.flips(update)
    phi = schedule.phi(draws.times(update))
    phi32 = phi.float()
    z = diffuse(batch.images, phi32, eps, flip)
    x = diffuse(batch.images, torch.zeros_like(phi32), eps, flip)
    output = model(z, phi32, batch.labels if conditional else None)
    prediction = model.prediction
    return weighted_loss(
        output,
        natural_target(prediction, x, eps, phi32),
        output_coefficient(prediction, phi).float(),
        natural_weight(prediction, weighting, phi).float(),
    ).mean()


def distillation_loss(
    student: Model, teacher: Model, draws: Draws, update: int, table: StepTable, conditional: bool
) -> Tensor:
    """Algorithm 2: the weighted error of one student step against two DDIM steps of the teacher; a scalar."""
    batch = draws.batch(update)
    cond = batch.labels if conditional else None
    rows = table.rows(draws.step_indices(update, len(table.phi)))
    z = diffuse(batch.images, rows.phi, draws.noise(update), draws.flips(update))
    with torch.no_grad():
        first = teacher(z, rows.phi, cond)
        z_mid = ddim_step(z, first, rows.ddim_z, rows.ddim_output)
        second = teacher(z_mid, rows.phi_mid, cond)
    output = student(z, rows.phi, cond)
    return ddim_step_weighted_loss(
        output,
        z,
        first,
        second,
        rows.target_z,
        rows.target_output,
        rows.target_output_mid,
        rows.output,
        rows.weight,
    ).mean()
