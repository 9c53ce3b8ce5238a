"""Distillation updates on random images, as pdfast makes them and as others do: what `benchmarks.step` compares.

    Pdfast                             the update of `pdfast.distill`, made by its own parts
    Rival(setting, None)               eager: the same U-Net of PyTorch's own layers, fp32, AdamW, clip_grad_norm_, torch.randn
    Rival(setting, mode)               what a good engineer writes in a day: channels_last, bf16 autocast (--dtype fp32: none), SDPA,
                                       torch.compile of each whole network, fused AdamW, cudnn.benchmark
    Rival(setting, mode, diffusers=True)   UNet2DModel of equal size, in either loop

Of each: `step()`, one update, from getting the images to the new weights; `tensors()`, what it keeps between steps; `running()`, what
its networks are called within; `networks()`, teacher and student, to be called by themselves from now on: a graph of the update is
let go. A rival's formulas outside of the networks are those published, and run op by op: they are a thousandth of the work.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.command import Unavailable
from pdfast.config import DistillConfig, EngineConfig
from pdfast.data import ResidentImages
from pdfast.diffusion import to_x
from pdfast.engine import parallelize
from pdfast.engine.loop import Trainer
from pdfast.engine.machine import Machine, open_machine
from pdfast.exporting.pipeline import unet2d_arguments
from pdfast.methods import Progressive
from pdfast.networks import NetworkConfig, UNet
from pdfast.networks.layers import Conv2d
from pdfast.rounds import fields_of_plan, resolve_steps
from pdfast_kernels.runtime import dispatch

NUM_IMAGES = 4096
WARM_UP = 4  # updates: compile, record a graph, and one more
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """What all updates of a comparison have in common."""

    config: DistillConfig
    machine: Machine
    source: ResidentImages
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    """Of teacher and student: not equal, or their difference, which is the loss, would be all rounding."""

    @property
    def device(self) -> torch.device:
        return self.machine.world.device


class Batch(NamedTuple):
    """x and eps [n, C, H, W], k int64 [n] in 1..steps, labels int64 [n] or None."""

    x: Tensor
    eps: Tensor
    k: Tensor
    labels: Tensor | None


def random_weights(network: NetworkConfig, seed: int) -> dict[str, Tensor]:
    """Of a U-Net, with those that begin at zero drawn too: else no error in them would show."""
    generator = torch.Generator().manual_seed(seed)
    weights = UNet(network).state_dict()
    for weight in weights.values():
        if weight.dim() > 1:
            weight.normal_(std=0.5 / math.sqrt(weight[0].numel()), generator=generator)
    return weights


@contextlib.contextmanager
def open_setting(preset: DistillConfig, device: torch.device, batch: int, engine: EngineConfig) -> Iterator[Setting]:
    """The preset's first round at that batch, on random images."""
    if preset.plan is None:
        resolved = resolve_steps((None, None, None), (preset.rounds, preset.start_steps, preset.end_steps))
        steps = dict(zip(("rounds", "start_steps", "end_steps"), resolved, strict=True))
    else:
        steps = fields_of_plan(preset.plan)
    train = replace(preset.train, batch_size=batch)
    config = replace(preset, device=str(device), batch_size=batch, train=train, engine=engine, **steps)
    network, generator = config.network, torch.Generator().manual_seed(0)
    shape = NUM_IMAGES, network.image_size, network.image_size, network.image_channels
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    classes = network.num_classes
    labels = torch.randint(classes, (NUM_IMAGES,), generator=generator) if classes else None
    source = ResidentImages("random", images, labels, device)
    with open_machine(config) as machine:
        yield Setting(config, machine, source, (random_weights(network, 0), random_weights(network, 1)))


class Pdfast:
    """The update of `pdfast.distill`."""

    running = contextlib.nullcontext

    def __init__(self, setting: Setting, compile: str = "auto") -> None:
        """compile: a value of --engine.compile."""
        config, machine = setting.config, setting.machine
        machine = replace(machine, settings=replace(machine.settings, compile=compile))
        self.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[machine.dtype]
        self.method = method = Progressive.open(config, machine)
        self.trainer = Trainer(method, method.optimization(config), config, machine, setting.source, log=None)
        for network, weights in zip((method.teacher, method.student), setting.weights, strict=True):
            parallelize.set_weights(network, weights, machine.world)
        method.student.train()
        self.trainer.optimizer.reset()
        self._update = 0

    def step(self) -> None:
        trainer, update = self.trainer, self._update
        trainer.batch.load(1, update)
        trainer.optimizer.set(update, trainer.optimization.learning_rate_at(update, 1_000_000))
        trainer.run_update()
        self._update += 1

    def tensors(self) -> list[Tensor]:
        return [*self.method.teacher.parameters(), *self.trainer.optimizer.state().values()]

    def networks(self) -> tuple[Network, Network]:
        self.trainer.run_update = self.trainer.update
        return self.method.teacher, self.method.student


class Rival:
    """A training loop as others write it."""

    def __init__(self, setting: Setting, mode: str | None, diffusers: bool = False) -> None:
        """mode: of torch.compile, None for none of what a good engineer would do."""
        self.setting, self._mode, device, network = setting, mode, setting.device, setting.config.network
        fast = mode is not None
        bf16 = fast and setting.machine.dtype == torch.bfloat16
        self.dtype = "bf16 autocast" if bf16 else "fp32"
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        torch.manual_seed(0)
        self._modules = [_Diffusers(network) if diffusers else plain_unet(network, w) for w in setting.weights]
        for module in self._modules:
            module.to(device, memory_format=torch.channels_last if fast else torch.contiguous_format)
        self._modules[0].eval().requires_grad_(False)
        self._calls: list[Network] = [*self._modules]
        if fast:
            torch._dynamo.reset()
            self._calls = [torch.compile(module, mode=mode, dynamic=False) for module in self._modules]
        parameters, rate = self._modules[1].parameters(), setting.config.learning_rate
        self._optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=fast or None)

    @contextlib.contextmanager
    def running(self):
        # PyTorch's own defaults, where a run of ours has others, but for what the fast loop sets.
        fast = self._mode is not None
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=fast, deterministic=False, allow_tf32=True)
        with flags, dispatch.use("reference"):
            if self._mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            yield

    def _draw(self) -> Batch:
        setting, n, device = self.setting, self.setting.config.batch_size, self.setting.device
        drawn = setting.source.take(torch.randint(setting.source.num_images, (n,), device=device))
        x = drawn.x.permute(0, 3, 1, 2).float() / 127.5 - 1
        if setting.config.flip:
            x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        k = torch.randint(1, setting.config.round_steps[0] + 1, (n,), device=device)
        return Batch(x, torch.randn_like(x), k, drawn.cond)

    def step(self) -> None:
        with self.running():
            losses = distillation_losses(*self.networks(), self._draw(), self.setting.config, torch.float32)
            losses.mean().backward()
            nn.utils.clip_grad_norm_(self._modules[1].parameters(), self.setting.config.clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        return [*(p for module in self._modules for p in module.parameters()), *states]

    def networks(self) -> tuple[Network, Network]:
        teacher, student = (self._autocast(lambda *given, c=call: c(*given).float()) for call in self._calls)
        return teacher, student


def plain_unet(network: NetworkConfig, weights: Mapping[str, Tensor]) -> UNet:
    """The U-Net with PyTorch's own convolutions, [out, in, height, width]; its other layers are plain PyTorch where
    PDFAST_KERNELS is `reference`."""
    model = UNet(network)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv2d):
                out_channels, size, _, in_channels = child.weight.shape
                setattr(module, name, nn.Conv2d(in_channels, out_channels, size, padding=size // 2))
    model.load_state_dict({name: w.permute(0, 3, 1, 2) if w.dim() == 4 else w for name, w in weights.items()})
    return model


class _Diffusers(nn.Module):
    """The same network of diffusers' own layers, with our call."""

    def __init__(self, network: NetworkConfig) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise Unavailable(f"diffusers is not installed ({error})") from None
        # By their formula for the time, in place of a table of times.
        positional = {"time_embedding_type": "positional", "num_train_timesteps": None}
        self.unet = UNet2DModel(**unet2d_arguments(network, 0) | positional)

    def forward(self, z: Tensor, phi: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.unet(z, phi * (1000 / (torch.pi / 2)), class_labels=cond, return_dict=False)[0]


def distillation_losses(
    teacher: Network, student: Network, batch: Batch, config: DistillConfig, dtype: torch.dtype
) -> Tensor:
    """Algorithm 2 of Salimans & Ho 2022 as it is published: the losses [n], in that dtype."""
    schedule, steps = config.schedule.build(), config.round_steps[0]
    angles = [schedule.phi((batch.k.double() - back) / steps) for back in (0, 0.5, 1)]
    angles[2] = torch.where(batch.k == 1, 0, angles[2])
    columns = [angle[:, None, None, None] for angle in angles]
    (alpha, sigma), (alpha_mid, sigma_mid), (alpha_next, sigma_next) = (
        (torch.cos(column).to(dtype), torch.sin(column).to(dtype)) for column in columns
    )

    def x_hat(network: Network, z: Tensor, phi: Tensor) -> Tensor:
        return to_x(config.network.prediction, network(z, phi.float(), batch.labels), z, phi.to(dtype))

    z = alpha * batch.x.to(dtype) + sigma * batch.eps.to(dtype)
    with torch.no_grad():
        x1 = x_hat(teacher, z, angles[0])
        z_mid = alpha_mid * x1 + sigma_mid / sigma * (z - alpha * x1)
        x2 = x_hat(teacher, z_mid, angles[1])
        z_next = alpha_next * x2 + sigma_next / sigma_mid * (z_mid - alpha_mid * x2)
        ratio = sigma_next / sigma
        target = (z_next - ratio * z) / (alpha_next - ratio * alpha)
    snr = (alpha / sigma) ** 2
    weights = {"x_mse": torch.ones_like(snr), "snr": snr, "truncated_snr": snr.clamp(min=1), "snr_plus_one": snr + 1}
    error = x_hat(student, z, angles[0]) - target
    return (weights[config.weighting] * error.square()).flatten(1).mean(1)
