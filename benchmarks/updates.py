"""One distillation update to measure: that of pdfast, as `pdfast.distill` runs it, and what every other must compute.

update = Pdfast(setting, machine)
update.step()          one update, from getting the images to the new weights
update.losses          float32 [n], each sample's, of the last step
update.drawn()         what that step was about
update.references()    teacher and student with the weights of now, in float64
update.cost            parameters, and floating-point operations of one forward of one image
update.tensors()       what it keeps between steps
update.watch(mark)     from now on `mark(stage)` is called at each stage's end
update.sample(steps)   draw a batch of images, down to uint8 on the host
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pdfast.config import DistillConfig, EngineConfig, resolve_steps
from pdfast.data import ResidentImages
from pdfast.diffusion import Prediction, Weighting, noise
from pdfast.diffusion.noise import Stream
from pdfast.distill import Rounds
from pdfast.engine import layout
from pdfast.engine.cost import parameters_and_flops
from pdfast.engine.machine import Machine, open_machine
from pdfast.engine.optimizer import linear_decay
from pdfast.networks import NetworkConfig, UNet
from pdfast.report.evaluator import draw
from pdfast_kernels import dispatch

STAGES = ("diffuse", "teacher", "student forward", "backward", "optimizer")
NUM_IMAGES = 4096
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """What all updates of a comparison have in common."""

    config: DistillConfig
    device: torch.device
    source: ResidentImages
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    """Of teacher and student: not equal, or their difference, which is the loss, would be all rounding."""
    bf16: bool
    """Whether activations are bf16, where a provider has the choice."""

    @property
    def steps(self) -> int:
        """Of the student, in the first round."""
        return self.config.round_steps[0]


@dataclass(frozen=True)
class Batch:
    """x and eps [n, C, H, W], k int64 [n] in 1..steps, labels int64 [n] or None."""

    x: Tensor
    eps: Tensor
    k: Tensor
    labels: Tensor | None

    def first(self, count: int) -> "Batch":
        labels = None if self.labels is None else self.labels[:count]
        return Batch(self.x[:count], self.eps[:count], self.k[:count], labels)


def random_weights(network: NetworkConfig, seed: int) -> dict[str, Tensor]:
    """Of a U-Net, with those that begin at zero drawn too: else no error in them would show."""
    generator = torch.Generator().manual_seed(seed)
    weights = UNet(network).state_dict()
    for weight in weights.values():
        if weight.dim() > 1:
            weight.normal_(std=0.5 / math.sqrt(weight[0].numel()), generator=generator)
    return weights


@contextmanager
def open_setting(
    preset: DistillConfig, device: torch.device, batch: int, engine: EngineConfig
) -> Iterator[tuple[Setting, Callable[[str], Machine]]]:
    """The preset's first round at that batch, on random images, and the machine by a value of --engine.compile.

    UsageError where the batch does not divide into the micro-batches.
    """
    rounds, start, end = resolve_steps((None, None, None), (preset.rounds, preset.start_steps, preset.end_steps))
    steps = {"rounds": rounds, "start_steps": start, "end_steps": end}
    train = replace(preset.train, batch_size=batch)
    config = replace(preset, device=str(device), batch_size=batch, train=train, engine=engine, **steps)
    network = config.network
    generator = torch.Generator().manual_seed(0)
    shape = NUM_IMAGES, network.image_size, network.image_size, network.image_channels
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    classes = network.num_classes
    labels = torch.randint(classes, (NUM_IMAGES,), generator=generator) if classes else None
    source = ResidentImages("random", images, labels, device)
    weights = random_weights(network, 0), random_weights(network, 1)
    with open_machine(config) as machine:

        def compiling(compile: str) -> Machine:
            return replace(machine, settings=replace(engine, compile=compile))

        yield Setting(config, device, source, weights, machine.dtype == torch.bfloat16), compiling


def reference(network: NetworkConfig, weights: Mapping[str, Tensor]) -> Network:
    """The U-Net with the blocks in float64, of plain PyTorch."""
    model = UNet(network)
    model.load_state_dict(weights)
    model.to(next(iter(weights.values())).device).dtype = torch.float64
    for block in model.blocks():
        block.double()

    def run(*arguments: Tensor | None) -> Tensor:
        with dispatch.use("reference"):
            return model(*arguments)

    return run


def _x(prediction: Prediction, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    match prediction:
        case "x":
            return output
        case "v":
            return alpha * z - sigma * output
        case "eps":
            return (z - sigma * output) / alpha
        case _:
            x, eps = output.chunk(2, dim=1)
            return sigma**2 * x + alpha * (z - sigma * eps)


def _weight(weighting: Weighting, alpha: Tensor, sigma: Tensor) -> Tensor:
    snr = (alpha / sigma) ** 2
    return {"x_mse": torch.ones_like(snr), "snr": snr, "truncated_snr": snr.clamp(min=1), "snr_plus_one": snr + 1}[
        weighting
    ]


def distillation_losses(
    teacher: Network,
    student: Network,
    batch: Batch,
    setting: Setting,
    dtype: torch.dtype,
    mark: Callable[[str], None] = lambda stage: None,
) -> Tensor:
    """Algorithm 2 of Salimans & Ho 2022 as it is published: the losses [n], in that dtype."""
    config, steps = setting.config, setting.steps
    prediction, schedule = config.network.prediction, config.schedule.build()
    phi, phi_mid, phi_next = (schedule.phi((batch.k.double() - back) / steps) for back in (0, 0.5, 1))
    phi_next = torch.where(batch.k == 1, 0, phi_next)
    angles = [phi[:, None, None, None] for phi in (phi, phi_mid, phi_next)]
    (alpha, sigma), (alpha_mid, sigma_mid), (alpha_next, sigma_next) = (
        (torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)) for angle in angles
    )
    x, eps = batch.x.to(dtype), batch.eps.to(dtype)
    z = alpha * x + sigma * eps
    mark("diffuse")
    with torch.no_grad():
        x1 = _x(prediction, teacher(z, phi.float(), batch.labels), z, alpha, sigma)
        z_mid = alpha_mid * x1 + sigma_mid / sigma * (z - alpha * x1)
        x2 = _x(prediction, teacher(z_mid, phi_mid.float(), batch.labels), z_mid, alpha_mid, sigma_mid)
        z_next = alpha_next * x2 + sigma_next / sigma_mid * (z_mid - alpha_mid * x2)
        ratio = sigma_next / sigma
        target = (z_next - ratio * z) / (alpha_next - ratio * alpha)
    mark("teacher")
    output = student(z, phi.float(), batch.labels)
    mark("student forward")
    error = _x(prediction, output, z, alpha, sigma) - target
    return (_weight(config.weighting, alpha, sigma) * error.square()).flatten(1).mean(1)


class _Watched:
    """A network that says when it is called and when it returns."""

    def __init__(self, network: torch.nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._network, self._before, self._after = network, before, after

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        self._before()
        output = self._network(*arguments)
        self._after()
        return output

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)


class Pdfast:
    """The update of `pdfast.distill`, made by its own parts."""

    def __init__(self, setting: Setting, machine: Machine) -> None:
        self.setting, self._machine = setting, machine
        self.dtype = str(machine.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
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

    @property
    def cost(self) -> tuple[int, int]:
        return parameters_and_flops(self.setting.config.network)

    def step(self) -> None:
        config, rounds, update = self.setting.config, self._rounds, self._update
        rounds.draws.load(1, update)
        rounds.optimizer.set(update, config.learning_rate * linear_decay(update, 1_000_000))
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

    def references(self) -> tuple[Network, Network]:
        device, network = self.setting.device, self.setting.config.network
        of_student = self._machine.whole_weights(self._rounds.student)
        teacher, student = (
            reference(network, {name: w.to(device) for name, w in weights.items()})
            for weights in (self.setting.weights[0], of_student)
        )
        return teacher, student

    def tensors(self) -> list[Tensor]:
        rounds = self._rounds
        return [*rounds.teacher.parameters(), *rounds.optimizer.state().values()]

    def watch(self, mark: Callable[[str], None]) -> None:
        rounds, optimize, last = self._rounds, self._rounds.optimizer.step, ""

        def end(stage: str) -> None:
            nonlocal last
            last = stage
            mark(stage)

        def marked_optimize(loss: Tensor) -> None:
            end("backward")
            optimize(loss)
            end("optimizer")

        rounds.optimizer.step = marked_optimize
        rounds.teacher = _Watched(
            rounds.teacher, lambda: end("teacher" if last == "teacher" else "diffuse"), lambda: end("teacher")
        )
        # Before it, what is around the teacher; or the backward of the micro-batch before.
        rounds.student = _Watched(
            rounds.student,
            lambda: end("backward" if last == "student forward" else "teacher"),
            lambda: end("student forward"),
        )
        rounds.run_update = self._machine.replayed(rounds._update)

    def sample(self, steps: int) -> None:
        config, network = self.setting.config, self._rounds.student.eval()
        draw(
            network,
            config.schedule.build(),
            steps,
            config.network.image_shape,
            config.batch_size,
            self._machine.world,
            seed=config.seed,
            num_classes=config.network.num_classes,
            batch_size=config.batch_size,
        )
