"""How others make a distillation update: what `benchmarks.step` measures pdfast against.

    eager      the same U-Net of PyTorch's own layers, fp32, AdamW, clip_grad_norm_, torch.randn: a port of the paper
    compile    what a good engineer writes in a day: channels_last, bf16 autocast (--dtype fp32: none), SDPA, torch.compile of
               each whole network, fused AdamW, cudnn.benchmark
    diffusers  UNet2DModel of equal size, in the loop of eager, and in that of compile

The formulas outside of the networks are those published, and run op by op: they are a thousandth of the work.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import Unavailable
from benchmarks.updates import Batch, Network, Setting, distillation_losses
from pdfast.diffusion import sample
from pdfast.exporting.pipeline import unet2d_arguments
from pdfast.networks import NetworkConfig, UNet
from pdfast.networks.layers import Conv2d
from pdfast_kernels.runtime import dispatch


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
        self.network = network
        self.unet = UNet2DModel(**unet2d_arguments(network, 0) | positional)

    def forward(self, z: Tensor, phi: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.unet(z, phi * (1000 / (torch.pi / 2)), class_labels=cond, return_dict=False)[0]


class Rival:
    """A training loop as others write it."""

    def __init__(self, setting: Setting, networks: list[nn.Module], mode: str | None, fused: bool) -> None:
        """networks: teacher and student; mode: of torch.compile, None for none; fused: with all that the `compile` loop has."""
        self.setting, self._fused, self._mode = setting, fused, mode
        bf16 = fused and setting.bf16
        self.dtype = "bf16 autocast" if bf16 else "fp32"
        self._autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=bf16)
        layout = torch.channels_last if fused else torch.contiguous_format
        self._teacher, self._student = (network.to(setting.device, memory_format=layout) for network in networks)
        self._teacher.eval().requires_grad_(False)
        self._call_teacher, self._call_student = self._teacher, self._student
        if mode is not None:
            torch._dynamo.reset()
            options: dict[str, Any] = {"mode": mode, "dynamic": False}
            self._call_teacher = torch.compile(self._teacher, **options)
            self._call_student = torch.compile(self._student, **options)
        self._optimizer = torch.optim.AdamW(
            self._student.parameters(), lr=setting.config.learning_rate, weight_decay=0.0, fused=True if fused else None
        )
        self.losses, self._batch = torch.empty(0), None
        self.has_weights_of_setting = not isinstance(self._student, _Diffusers)

    @contextlib.contextmanager
    def running(self):
        # PyTorch's own defaults, where a run of ours has others, but for what the `compile` loop sets.
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=self._fused, deterministic=False, allow_tf32=True)
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
        return Batch(x, torch.randn_like(x), torch.randint(1, setting.steps + 1, (n,), device=device), drawn.cond)

    def _network(self, call: Network) -> Network:
        def run(z: Tensor, phi: Tensor, cond: Tensor | None) -> Tensor:
            with self._autocast:
                return call(z, phi, cond).float()

        return run

    def step(self) -> None:
        with self.running():
            self._batch = batch = self._draw()
            losses = distillation_losses(*self.networks(), batch, self.setting, torch.float32)
            losses.mean().backward()
            self.losses = losses.detach()
            nn.utils.clip_grad_norm_(self._student.parameters(), self.setting.config.clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def drawn(self) -> Batch:
        assert self._batch
        return self._batch

    def tensors(self) -> list[Tensor]:
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        return [*self._teacher.parameters(), *self._student.parameters(), *states]

    def networks(self) -> tuple[Network, Network]:
        return self._network(self._call_teacher), self._network(self._call_student)

    @torch.no_grad()
    def sample(self, steps: int) -> None:
        config, device = self.setting.config, self.setting.device
        n, classes = config.batch_size, config.network.num_classes
        z = torch.randn(n, *config.network.image_shape, device=device)
        labels = torch.randint(classes, (n,), device=device) if classes else None
        with self.running():
            network, prediction = self.networks()[0], config.network.prediction
            x = sample(network, z, config.schedule.build(), steps, cond=labels, prediction=prediction)
        ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def eager(setting: Setting) -> Rival:
    networks = [plain_unet(setting.config.network, weights) for weights in setting.weights]
    return Rival(setting, networks, mode=None, fused=False)


def compiled(setting: Setting, mode: str) -> Rival:
    networks = [plain_unet(setting.config.network, weights) for weights in setting.weights]
    return Rival(setting, networks, mode=mode, fused=True)


def diffusers(setting: Setting, mode: str | None) -> Rival:
    torch.manual_seed(0)
    networks = [_Diffusers(setting.config.network) for _ in range(2)]
    return Rival(setting, networks, mode=mode, fused=mode is not None)
