"""One update: the teacher's (Algorithm 1) and the student's (Algorithm 2 of Salimans & Ho 2022).

Every random number is a function of (seed, round, update, index in the global batch): see `pdfast.diffusion.noise`. What
an update reads is in tensors that stay where they are, so that it can be replayed as a CUDA graph.
"""

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pdfast.data import Batch, ImageSource
from pdfast.diffusion import (
    Model,
    Prediction,
    Schedule,
    StepTable,
    Weighting,
    natural_angle,
    natural_weight,
    noise,
    output_coefficient,
    to_v,
)
from pdfast.diffusion.noise import Stream
from pdfast.engine.layout import last_of_batch
from pdfast.engine.world import World
from pdfast.loss import as_it_is, check_predictions, student_losses, teacher_outputs
from pdfast.networks import Network
from pdfast_kernels import diffuse, weighted_loss

STREAMS = (Stream.NOISE, Stream.TIME, Stream.FLIP)


class Draws:
    """This process's part of each update's data and random numbers."""

    def __init__(
        self, source: ImageSource, world: World, *, seed: int, batch_size: int, flip: bool, conditional: bool
    ) -> None:
        """batch_size: images an update on all processes, a multiple of their number."""
        self._source, self._seed, self._batch_size, self._flip = source, seed, batch_size, flip
        self._part = world.part(batch_size)
        self.index = self._part.to(world.device)
        """Places of this process's samples in the global batch: int64 [n]."""
        count = len(self._part)
        self.images = torch.empty(count, *source.shape, dtype=torch.uint8, device=world.device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=world.device) if conditional else None
        self._stream: Iterator[Batch] = iter(())
        self._loaded: tuple[int, int] | None = None  # round and update
        self._keys = torch.zeros(len(STREAMS), 4, dtype=torch.int64, device=world.device)
        self.waited = 0.0
        """Seconds spent on getting data."""

    def load(self, round_index: int, update: int) -> None:
        """Get the images of an update (round_index 0 is the teacher's training) and the keys of its random numbers."""
        began = time.perf_counter()
        if self._loaded != (round_index, update):
            if self._loaded != (round_index, update - 1):
                seed = self._seed + (round_index << 32)
                self._stream = self._source.stream(self._part, self._batch_size, update, seed)
            batch = next(self._stream)
            self.images.copy_(batch.images, non_blocking=True)
            if self.labels is not None:
                assert batch.labels is not None  # a source without any is refused when it is opened
                self.labels.copy_(batch.labels, non_blocking=True)
            self._loaded = round_index, update
        keys = torch.tensor([noise.key(self._seed, stream, round_index, update) for stream in STREAMS])
        self._keys.copy_(keys if self._keys.device.type == "cpu" else keys.pin_memory(), non_blocking=True)
        self.waited += time.perf_counter() - began

    def key(self, stream: Stream) -> Tensor:
        return self._keys[STREAMS.index(stream)]

    def times(self) -> Tensor:
        """Diffusion times, uniform in (0, 1): float64 [n]."""
        return noise.uniform(self.key(Stream.TIME), self.index)

    def step_indices(self, rows: Tensor) -> Tensor:
        """Rows of a step table, uniform in 1..rows: int64 [n]."""
        return 1 + noise.integer(self.key(Stream.TIME), self.index, rows)

    def diffused(self, phi: Tensor) -> Tensor:
        """The images, flipped where that is drawn, and their noise, at angles phi [n]: float32 [n, C, H, W]."""
        flip = noise.integer(self.key(Stream.FLIP), self.index, 2).bool() if self._flip else None
        return diffuse(self.images, phi, self.key(Stream.NOISE), self.index, flip)


class RoundTable:
    """The step table of the round under way, in tensors that serve all rounds."""

    def __init__(self, largest: StepTable) -> None:
        """largest: the table of the round with the most rows, on the device."""
        self.rows = largest
        self.count = torch.full((), len(largest), dtype=torch.int64, device=largest.phi.device)

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


def _parts(count: int, micro_batches: int) -> list[slice]:
    each = count // micro_batches
    return [slice(i * each, (i + 1) * each) for i in range(micro_batches)]


def _of(labels: Tensor | None, part: slice) -> Tensor | None:
    return None if labels is None else labels[part]


@functools.cache
def _one_graph(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _noisy_images(draws: Draws, schedule: Schedule, prediction: Prediction, weighting: Weighting) -> tuple[Tensor, ...]:
    """For the teacher: z, its angle [n], what the network is to say of it, and the coefficient and weight of the error."""
    phi = schedule.phi(draws.times())
    z, target = draws.diffused(phi), draws.diffused(natural_angle(prediction, phi))
    coefficient = output_coefficient(prediction, phi).float()
    return z, phi.float(), target, coefficient, natural_weight(prediction, weighting, phi).float()


def teacher_gradient(
    model: nn.Module,
    draws: Draws,
    schedule: Schedule,
    weighting: Weighting,
    micro_batches: int = 1,
    compiled: bool = False,
) -> Tensor:
    """Algorithm 1: the weighted error of the network's prediction at uniformly drawn times.

    compiled: what is around the network too. Leaves the gradient of the mean in the parameters. Returns the losses, float32 [n].
    """
    run = _one_graph if compiled else as_it_is
    z, phi, target, coefficient, weight = run(_noisy_images)(draws, schedule, model.prediction, weighting)
    return _gradient(model, draws.labels, z, phi, target, coefficient, weight, micro_batches, run)


def _gradient(
    model: nn.Module,
    labels: Tensor | None,
    z: Tensor,
    phi: Tensor,
    target: Tensor,
    coefficient: Tensor,
    weight: Tensor,
    micro_batches: int,
    run: Callable[[Callable], Callable],
) -> Tensor:
    model.zero_grad(set_to_none=True)
    losses = []
    parts = _parts(len(z), micro_batches)
    for part in parts:
        output = model(z[part], phi[part], _of(labels, part))
        loss = run(weighted_loss)(output, target[part], coefficient[part], weight[part])
        last_of_batch(model, part is parts[-1])
        (loss.mean() / micro_batches).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def conversion_gradient(
    copy: nn.Module,
    draws: Draws,
    original: Network,
    regular: tuple[float, float],
    end: float,
    micro_batches: int = 1,
    compiled: bool = False,
) -> Tensor:
    """The error of v of a copy that predicts v: next to its original at the angles `regular`, between which that says what v
    is, and next to the truth, as in Algorithm 1, at the rest of [0, end], where half of the images are.

    Leaves the gradient of the mean in the parameters. Returns the losses, float32 [n].
    """
    (low, high), u = regular, 2 * draws.times()
    # The regular angles for u < 1; for more what is below them, then what is above.
    rest = (u - 1) * (end - (high - low))
    phi = torch.where(u < 1, low + u * (high - low), torch.where(rest < low, rest, rest + (high - low)))
    z, target = draws.diffused(phi), draws.diffused(natural_angle("v", phi))
    phi = phi.float()
    with torch.no_grad():
        theirs = to_v(original.prediction, original(z, phi, draws.labels), z, phi)
    target = torch.where((u < 1).view(-1, 1, 1, 1), theirs, target)
    one = torch.ones_like(phi)
    run = _one_graph if compiled else as_it_is
    return _gradient(copy, draws.labels, z, phi, target, one[:, None], one, micro_batches, run)


def _images_at_steps(draws: Draws, table: RoundTable) -> tuple[Tensor, Tensor, Tensor]:
    """For the student: step indices k [n], the angle [n] of each, and the images there."""
    k = draws.step_indices(table.count)
    phi = table.rows.phi[k - 1]
    return k, phi, draws.diffused(phi)


def distillation_gradient(
    student: nn.Module,
    teacher: Model,
    draws: Draws,
    table: RoundTable,
    micro_batches: int = 1,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2: the weighted error of one student step against two DDIM steps of the teacher.

    The teacher sees the whole batch, the student one of `micro_batches` parts at a time. compiled: what is around the
    networks too. Leaves the gradient of the mean in the student's parameters. Returns the losses, float32 [n], and the step indices, int64 [n].
    """
    rows = table.rows
    check_predictions(rows, student=student, teacher=teacher)
    run = _one_graph if compiled else as_it_is
    student.zero_grad(set_to_none=True)
    k, phi, z = run(_images_at_steps)(draws, table)
    index = k - 1
    start, first, second = teacher_outputs(teacher, z, rows, index, draws.labels, run)
    losses = []
    parts = _parts(len(z), micro_batches)
    for part in parts:
        output = student(z[part], phi[part], _of(draws.labels, part))
        loss = student_losses(output, start[part], first[part], second[part], rows, index[part], run)
        last_of_batch(student, part is parts[-1])
        (loss.mean() / micro_batches).backward()
        losses.append(loss.detach())
    return torch.cat(losses), k
