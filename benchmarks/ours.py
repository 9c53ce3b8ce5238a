"""The update of `pdfast.distill`, made by its own parts: all that benchmarks of updates need of the engine."""

import contextlib

import torch
from torch import Tensor

from benchmarks.updates import Batch, Network, Setting
from pdfast.diffusion import noise
from pdfast.diffusion.noise import Stream
from pdfast.distill import Rounds
from pdfast.engine import layout
from pdfast.engine.machine import Machine
from pdfast.engine.optimizer import linear_decay
from pdfast.report.evaluator import draw


class Pdfast:
    """An update, with all that benchmarks.updates says of one."""

    has_weights_of_setting = True

    def __init__(self, setting: Setting, machine: Machine) -> None:
        self.setting, self._machine = setting, machine
        self.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[machine.dtype]
        self._rounds = rounds = Rounds(setting.config, machine, setting.source, log=None)
        for network, weights in zip((rounds.teacher, rounds.student), setting.weights, strict=True):
            layout.set_weights(network, weights, machine.world)
        rounds.student.train()
        rounds.optimizer.reset()
        self.losses = torch.zeros_like(rounds.draws.index, dtype=torch.float32)
        add = rounds.losses.add

        def add_and_keep(losses: Tensor, k: Tensor, steps: Tensor) -> None:
            self.losses.copy_(losses)
            add(losses, k, steps)

        rounds.losses.add = add_and_keep
        self._update = 0

    def step(self) -> None:
        rounds, update = self._rounds, self._update
        rounds.draws.load(1, update)
        rounds.optimizer.set(update, self.setting.config.learning_rate * linear_decay(update, 1_000_000))
        rounds.run_update()
        self._update += 1

    def drawn(self) -> Batch:
        draws, config = self._rounds.draws, self.setting.config
        x = draws.images.permute(0, 3, 1, 2).double() / 127.5 - 1
        if config.flip:
            flip = noise.integer(draws.key(Stream.FLIP), draws.index, 2).bool()
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        eps = noise.normal(draws.key(Stream.NOISE), draws.index, config.network.image_shape)
        return Batch(x, eps, draws.step_indices(self._rounds.table.count), draws.labels)

    def tensors(self) -> list[Tensor]:
        return [*self._rounds.teacher.parameters(), *self._rounds.optimizer.state().values()]

    def running(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def networks(self) -> tuple[Network, Network]:
        self._rounds.run_update = self._rounds._update
        return self._rounds.teacher, self._rounds.student

    def sample(self, steps: int) -> None:
        config, network, n = self.setting.config, self._rounds.student.eval(), self.setting.config.batch_size
        of, shape = {"seed": config.seed, "num_classes": config.network.num_classes}, config.network.image_shape
        draw(network, config.schedule.build(), steps, shape, n, self._machine.world, batch_size=n, **of)
