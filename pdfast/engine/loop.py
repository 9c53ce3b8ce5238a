"""The one training loop: resume, load, update, log, stop, checkpoint. What is trained, and on what, is a `Method`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from pdfast.config import DistillConfig, RunConfig, TeacherConfig
from pdfast.data import ImageSource
from pdfast.engine.batch import TrainingBatch, accumulate_gradient
from pdfast.engine.checkpoint import Checkpoint, Checkpoints
from pdfast.engine.cost import UpdateCost
from pdfast.engine.log import Progress, RunLog
from pdfast.engine.machine import Machine
from pdfast.engine.optimizer import linear_decay, linear_warmup
from pdfast.engine.throughput import Losses
from pdfast.io.errors import Interrupted, UsageError
from pdfast.io.text import count_steps
from pdfast.networks import Network

RESUME_HINT = "the same command goes on from here"


@dataclass(frozen=True)
class Optimization:
    """How a method optimizes its student: Adam, its learning rate, the EMA and the regularization."""

    batch_size: int
    learning_rate: float
    clip: float
    ema: float
    warmup: int = 0
    """Updates over which the learning rate rises from 0."""
    decay: float = 1.0
    """Fraction of the updates, at the end, over which the learning rate falls linearly to 0."""
    weight_decay: float = 0.0
    dropout: float = 0.0
    fast_ema: float = 0.0
    """Decay of the EMA that is `Method.average`."""

    @classmethod
    def of_teacher(cls, settings: TeacherConfig) -> "Optimization":
        """Return the optimization of a teacher's training."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls) if f.name != "fast_ema"})

    @classmethod
    def of_rounds(cls, config: DistillConfig) -> "Optimization":
        """Return the optimization of the rounds: annealed to 0, without dropout."""
        return cls(config.batch_size, config.learning_rate, config.clip, config.ema, fast_ema=config.tract.ema)

    def learning_rate_at(self, update: int, updates: int) -> float:
        """Return the learning rate of the update with that index, of so many."""
        return self.learning_rate * (linear_warmup(update, self.warmup) * linear_decay(update, updates, self.decay))


@dataclass(frozen=True)
class Targets:
    """What a method has computed for a batch before its student runs."""

    given: tuple
    """What `Method.losses` takes, one micro-batch at a time: trees of tensors with the batch first."""
    row: Tensor
    """What the losses are logged by: int64 [n] in 1..count, a row of the step table or a bucket of diffusion times."""
    count: Tensor
    """int64 []."""


class Method:
    """What differs between the things that are trained.

    A subclass sets `cost` and defines `targets` and `losses`; whatever these change between two updates is in tensors that stay
    where they are, and in `state`.
    """

    cost: UpdateCost
    phase: ClassVar[str]
    """Its name in log.jsonl."""
    student: Network
    """The network that is trained."""
    average: Network | None = None
    """A network like the student whose weights are an EMA of its, kept by the optimizer, where targets need one."""

    def load(self, batch: TrainingBatch, stage: "Stage", update: int) -> None:
        """Get ready what the update with that index reads: the batch's images and random numbers."""
        batch.load(stage.round_index, update)

    def targets(self, batch: TrainingBatch) -> Targets:
        """Compute, without a gradient, what the student's losses on the batch need."""
        raise NotImplementedError

    def losses(self, *given: Any) -> Tensor:
        """Run the student on a micro-batch of what `targets` gave; return the loss of each sample, float32 [n]."""
        raise NotImplementedError

    def gradient(self, batch: TrainingBatch, micro_batches: int = 1) -> tuple[Tensor, Targets]:
        """Leave the gradient of the mean loss in the student's parameters; return the losses, float32 [n], and the targets."""
        self.student.zero_grad(set_to_none=True)
        targets = self.targets(batch)
        return accumulate_gradient(self.student, self.losses, targets.given, micro_batches), targets

    def begin(self, batch: TrainingBatch, stage: "Stage", log: RunLog) -> None:
        """Get ready for a stage, and check that it may begin. Raises RunError where it may not."""

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides the student and its optimizer: tensors equal on all processes, by names of their own."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, from among the tensors of a checkpoint, on the CPU."""


@dataclass(frozen=True)
class Stage:
    """One pass of the loop: the training of a teacher, or a round."""

    updates: int
    steps: int | None = None
    """The student's step count; None for a teacher."""
    round_index: int = 0
    teacher_sha256: str | None = None
    """Of the weights that a round distills."""
    learning_rate: float | None = None
    """At its start; None is that of the optimization."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return "the teacher" if self.steps is None else f"the round to {count_steps(self.steps)}"

    def checkpoints(self, config: RunConfig, machine: Machine) -> Checkpoints:
        """Return the stage's checkpoints in the run's folder."""
        name = "teacher" if self.steps is None else f"student-{self.steps:04d}"
        return Checkpoints(config.run, name, machine.world)

    @property
    def facts(self) -> dict[str, Any]:
        """What its checkpoints say of it."""
        return {} if self.steps is None else {"round": self.round_index, "teacher_sha256": self.teacher_sha256}

    def check(self, checkpoint: Checkpoint, config: RunConfig) -> None:
        """Raise a UsageError for a checkpoint of a round that distilled other weights."""
        if self.steps is not None and checkpoint.extra["teacher_sha256"] != self.teacher_sha256:
            raise UsageError(
                f"{self.title} in {config.run} was begun from another teacher than there is now: restore that one, or delete "
                "the round's checkpoints to start it again"
            )


class Trainer:
    """Trains a method's student, stage after stage. All tensors are allocated once and reused by every stage, so that CUDA
    graphs and compiled code stay valid."""

    def __init__(
        self,
        method: Method,
        optimization: Optimization,
        config: RunConfig,
        machine: Machine,
        source: ImageSource,
        log: RunLog,
    ) -> None:
        self.method, self.optimization, self.config, self.machine, self.log = method, optimization, config, machine, log
        self.optimizer = machine.optimizer(
            method.student,
            clip=optimization.clip,
            ema=optimization.ema,
            weight_decay=optimization.weight_decay,
            fast=method.average,
            fast_ema=optimization.fast_ema,
        )
        batch_size = optimization.batch_size
        self.batch = TrainingBatch(
            source, machine.world, method.student.config, seed=config.seed, batch_size=batch_size, flip=config.flip
        )
        self.losses = Losses(machine.world)
        self.run_update: Callable[[], None] = machine.cuda_graphed(self.update)

    def update(self) -> None:
        """One update on the batch that is loaded: targets, the student and its backward, clip, Adam, EMA."""
        losses, targets = self.method.gradient(self.batch, self.machine.settings.micro_batches)
        self.losses.add(losses, targets.row, targets.count)
        self.optimizer.step(losses.mean())

    def train(self, stage: Stage) -> dict[str, Any]:
        """Train a stage, or go on with it; return its figures. The student then has the EMA weights, where there are any."""
        config, machine, log, optimizer = self.config, self.machine, self.log, self.optimizer
        settings, updates = self.optimization, stage.updates
        if stage.learning_rate is not None:
            settings = replace(settings, learning_rate=stage.learning_rate)
        self.method.student.train()
        optimizer.reset()
        self.method.begin(self.batch, stage, log)
        checkpoints = stage.checkpoints(config, machine)
        start, seconds = 0, 0.0
        if checkpoint := checkpoints.latest():
            stage.check(checkpoint, config)
            for part in (optimizer, self.losses, self.method):
                part.load_state(checkpoint.tensors)
            start, seconds = checkpoint.update, checkpoint.extra["seconds"]
            log.say(f"resuming {stage.title} at update {start}")
        log.forget_after(stage.steps, start)

        progress = Progress(
            log,
            self.losses,
            machine.speed(settings.batch_size, self.method.cost),
            optimizer,
            self.batch,
            phase=self.method.phase,
            steps=stage.steps,
            start=start,
            updates=updates,
            seconds=seconds,
            every=config.log_every,
        )
        for update in range(start, updates):
            learning_rate = settings.learning_rate_at(update, updates)
            if settings.dropout:
                machine.seed_dropout(config.seed, update)
            self.method.load(self.batch, stage, update)
            optimizer.set(update, learning_rate)
            self.run_update()
            progress.update(update + 1, learning_rate)
            machine.stop_if_not_finite(optimizer, self.losses, update, stage.title, config.log_every)
            place = f"update {update + 1} of {stage.title}"
            stopping = machine.asked_to_stop(place)
            if stopping or (update + 1) % config.checkpoint_every == 0 or update + 1 == updates:
                extra = {"seconds": progress.seconds, "samples": (update + 1) * settings.batch_size} | stage.facts
                common = optimizer.counters() | self.losses.state() | self.method.state()
                checkpoints.save(update + 1, optimizer.state(), common, extra)
            checkpoints.poll()
            if stopping:
                checkpoints.finish()
                progress.close()
                raise Interrupted(f"stopped at {place} and saved it; {RESUME_HINT}")
        checkpoints.finish()
        progress.close()
        optimizer.copy_ema_to_model()
        images = updates * settings.batch_size
        return {
            "updates": updates,
            "images": images,
            "seconds": progress.seconds,
            "images_per_second": images / max(progress.seconds, 1e-9),
            "network_evaluations": round(images * self.method.cost.evaluations),
            "skipped": int(optimizer.skipped[0]),
        }
