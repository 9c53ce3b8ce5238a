"""The update of `pdfast.distill`, made by its own parts: all that benchmarks of updates need of the engine."""

import contextlib

import torch
from torch import Tensor

from benchmarks.updates import Batch, Network, Setting
from pdfast.diffusion import noise
from pdfast.diffusion.noise import Stream
from pdfast.engine import parallelize
from pdfast.engine.loop import Trainer
from pdfast.engine.machine import Machine
from pdfast.evaluation.evaluator import draw
from pdfast.methods import Progressive


class Pdfast:
    """An update, with all that benchmarks.updates says of one."""

    has_weights_of_setting = True

    def __init__(self, setting: Setting, machine: Machine) -> None:
        self.setting, self._machine = setting, machine
        self.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[machine.dtype]
        config = setting.config
        self._method = method = Progressive.open(config, machine)
        self._trainer = Trainer(method, method.optimization(config), config, machine, setting.source, log=None)
        for network, weights in zip((method.teacher, method.student), setting.weights, strict=True):
            parallelize.set_weights(network, weights, machine.world)
        method.student.train()
        self._trainer.optimizer.reset()
        self.losses = torch.zeros_like(self._trainer.batch.index, dtype=torch.float32)
        add = self._trainer.losses.add

        def add_and_keep(losses: Tensor, k: Tensor, steps: Tensor) -> None:
            self.losses.copy_(losses)
            add(losses, k, steps)

        self._trainer.losses.add = add_and_keep
        self._update = 0

    def step(self) -> None:
        trainer, update = self._trainer, self._update
        trainer.batch.load(1, update)
        trainer.optimizer.set(update, trainer.optimization.learning_rate_at(update, 1_000_000))
        trainer.run_update()
        self._update += 1

    def drawn(self) -> Batch:
        batch, config = self._trainer.batch, self.setting.config
        x = batch.x.permute(0, 3, 1, 2).double() / 127.5 - 1
        if config.flip:
            flip = noise.integer(batch.key(Stream.FLIP), batch.index, 2).bool()
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        eps = noise.normal(batch.key(Stream.NOISE), batch.index, config.network.image_shape)
        return Batch(x, eps, batch.step_indices(self._method.table.count), batch.cond)

    def tensors(self) -> list[Tensor]:
        return [*self._method.teacher.parameters(), *self._trainer.optimizer.state().values()]

    def running(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def networks(self) -> tuple[Network, Network]:
        self._trainer.run_update = self._trainer.update
        return self._method.teacher, self._method.student

    def sample(self, steps: int) -> None:
        config, network, n = self.setting.config, self._method.student.eval(), self.setting.config.batch_size
        draw(network, config.schedule.build(), steps, n, self._machine.world, seed=config.seed, batch_size=n)
