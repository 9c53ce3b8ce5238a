"""What every distillation update that is measured has in common: the setting, what it was about, what it must compute.

update.step()          one update, from getting the images to the new weights
update.losses          float32 [n], each sample's, of the last step
update.drawn()         what that step was about
update.has_weights_of_setting   whether it begins with them
update.tensors()       what it keeps between steps
update.running()       what its networks are called within
update.networks()      teacher and student, to be called by themselves from now on: a graph of the update is let go
update.sample(steps)   draw a batch of images, down to uint8 on the host
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pdfast.config import DistillConfig, EngineConfig, resolve_steps
from pdfast.data import ResidentImages
from pdfast.diffusion import to_x
from pdfast.engine.machine import Machine, open_machine
from pdfast.networks import NetworkConfig, UNet
from pdfast_kernels.runtime import dispatch

NUM_IMAGES = 4096
WARM_UP = 4  # updates: compile, record a graph, and one more
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


class Batch(NamedTuple):
    """x and eps [n, C, H, W], k int64 [n] in 1..steps, labels int64 [n] or None."""

    x: Tensor
    eps: Tensor
    k: Tensor
    labels: Tensor | None

    def first(self, count: int) -> "Batch":
        return Batch(*(None if tensor is None else tensor[:count] for tensor in self))


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
    """The preset's first round at that batch, on random images, and the machine by a value of --engine.compile."""
    resolved = resolve_steps((None, None, None), (preset.rounds, preset.start_steps, preset.end_steps))
    steps = dict(zip(("rounds", "start_steps", "end_steps"), resolved, strict=True))
    train = replace(preset.train, batch_size=batch)
    config = replace(preset, device=str(device), batch_size=batch, train=train, engine=engine, **steps)
    network, generator = config.network, torch.Generator().manual_seed(0)
    shape = NUM_IMAGES, network.image_size, network.image_size, network.image_channels
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    classes = network.num_classes
    labels = torch.randint(classes, (NUM_IMAGES,), generator=generator) if classes else None
    source = ResidentImages("random", images, labels, device)
    weights = random_weights(network, 0), random_weights(network, 1)
    with open_machine(config) as machine:
        setting = Setting(config, device, source, weights, machine.dtype == torch.bfloat16)
        yield setting, lambda compile: replace(machine, settings=replace(engine, compile=compile))


def reference(network: NetworkConfig, weights: Mapping[str, Tensor]) -> Network:
    """The U-Net with the blocks in float64, of plain PyTorch."""
    model = UNet(network)
    model.load_state_dict(weights)
    model.to(next(iter(weights.values())).device).dtype = torch.float64
    for block in model.blocks():
        block.double()
    return dispatch.use("reference")(model.forward)


def distillation_losses(
    teacher: Network, student: Network, batch: Batch, setting: Setting, dtype: torch.dtype
) -> Tensor:
    """Algorithm 2 of Salimans & Ho 2022 as it is published: the losses [n], in that dtype."""
    config, schedule = setting.config, setting.config.schedule.build()
    angles = [schedule.phi((batch.k.double() - back) / setting.steps) for back in (0, 0.5, 1)]
    angles[2] = torch.where(batch.k == 1, 0, angles[2])
    columns = [angle[:, None, None, None] for angle in angles]
    (alpha, sigma), (alpha_mid, sigma_mid), (alpha_next, sigma_next) = (
        (torch.cos(column).to(dtype), torch.sin(column).to(dtype)) for column in columns
    )

    def x_hat(output: Tensor, z: Tensor, phi: Tensor) -> Tensor:
        return to_x(config.network.prediction, output, z, phi.to(dtype))

    z = alpha * batch.x.to(dtype) + sigma * batch.eps.to(dtype)
    with torch.no_grad():
        x1 = x_hat(teacher(z, angles[0].float(), batch.labels), z, angles[0])
        z_mid = alpha_mid * x1 + sigma_mid / sigma * (z - alpha * x1)
        x2 = x_hat(teacher(z_mid, angles[1].float(), batch.labels), z_mid, angles[1])
        z_next = alpha_next * x2 + sigma_next / sigma_mid * (z_mid - alpha_mid * x2)
        ratio = sigma_next / sigma
        target = (z_next - ratio * z) / (alpha_next - ratio * alpha)
    output = student(z, angles[0].float(), batch.labels)
    snr = (alpha / sigma) ** 2
    weights = {"x_mse": torch.ones_like(snr), "snr": snr, "truncated_snr": snr.clamp(min=1), "snr_plus_one": snr + 1}
    error = x_hat(output, z, angles[0]) - target
    return (weights[config.weighting] * error.square()).flatten(1).mean(1)
