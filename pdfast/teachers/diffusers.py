"""Networks of diffusers pipelines: UNet2DModel under a discrete variance-preserving schedule, or preconditioned as in EDM.

Read offline, from safetensors, and by an allow-list of classes: no code that comes with a model is run.

A discrete schedule has its alpha-bars at times 0..T-1; between them a network is asked at fractional times, linear in the
angle.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pdfast.config import ScheduleConfig
from pdfast.diffusion import Prediction
from pdfast.diffusion.schedules import AlphaBars, Schedule
from pdfast.errors import UsageError
from pdfast.names import utf8_path
from pdfast.networks import Network
from pdfast.networks.layers import upsample
from pdfast.reading import read_json
from pdfast.teachers import preconditioning

INSTALL = "pip install 'pdfast[diffusers]'"
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
OF_THE_TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
OF_EDM = ("sigma_min", "sigma_max", "sigma_data", "prediction_type")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def library() -> Any:
    """diffusers. UsageError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"models of diffusers need diffusers ({error}): {INSTALL}") from None
    return diffusers


def alpha_bars(scheduler: dict[str, Any]) -> Tensor:
    """The table that a scheduler's configuration means to diffusers, which computes it: float64 [T]."""
    given = {name: scheduler[name] for name in OF_THE_TABLE if name in scheduler}
    return getattr(library(), scheduler["_class_name"])(**given).alphas_cumprod.double()


@dataclass(frozen=True)
class DiffusersConfig:
    """A UNet2DModel and the times it was trained at."""

    image_size: int
    image_channels: int
    prediction: Prediction
    """Of the adapted network."""
    num_classes: int
    unet: dict[str, Any]
    """Of unet/config.json."""
    scheduler: dict[str, Any]
    """Of scheduler_config.json, what concerns the network."""
    kind: str = "diffusers"

    def __hash__(self) -> int:
        return hash(json.dumps([self.unet, self.scheduler]))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_channels, self.image_size, self.image_size

    def build(self, dropout: float = 0.0) -> "DiffusersNetwork":
        return DiffusersNetwork(self, dropout)


class DiffusersNetwork(Network):
    """A UNet2DModel with our call; activations of `dtype` by autocast."""

    unet: Any
    knots: Tensor
    """Angles of the times -1 (no noise), 0, ..., T-1: float32 [T + 1]."""

    def __init__(self, config: DiffusersConfig, dropout: float = 0.0, unet: nn.Module | None = None) -> None:
        """unet: the UNet2DModel, if there is one already."""
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.prediction = config.prediction
        if unet is None:
            unet = library().UNet2DModel.from_config(config.unet | {"dropout": dropout})
            upsample_without_atomics(unet)
        self.unet = unet
        self.preconditioned = config.scheduler["_class_name"] in EDM
        with torch.device("cpu"):  # a table, even where the network is only to be counted
            knots = torch.zeros(0) if self.preconditioned else AlphaBars(alpha_bars(config.scheduler)).knots.float()
        self.register_buffer("knots", knots, persistent=False)

    def blocks(self) -> Iterator[nn.Module]:
        from diffusers.models.attention_processor import Attention
        from diffusers.models.downsampling import Downsample2D
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.upsampling import Upsample2D

        def within(module: nn.Module) -> Iterator[nn.Module]:
            for child in module.children():
                if isinstance(child, Attention | Downsample2D | ResnetBlock2D | Upsample2D):
                    yield child
                else:
                    yield from within(child)

        return within(self.unet)

    def times(self, phi: Tensor) -> Tensor:
        """What the U-Net was told at angles phi [N] when it was trained: float32 [N]."""
        if self.preconditioned:
            return preconditioning.noise_label(phi, self.config.scheduler["sigma_min"])
        above = torch.searchsorted(self.knots, phi.contiguous()).clamp(1, len(self.knots) - 1)
        lower, upper = self.knots[above - 1], self.knots[above]
        return (above - 2 + (phi - lower) / (upper - lower)).clamp(0, len(self.knots) - 2)

    def coefficients(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(s, a, b), each [N], of output = a z + b F(s z; time) where F is the U-Net."""
        if not self.preconditioned:
            one = torch.ones_like(phi)
            return one, torch.zeros_like(phi), one
        scheduler = self.config.scheduler
        s, a, b = preconditioning.coefficients(phi, scheduler["sigma_data"])
        return s, a, b if scheduler["prediction_type"] == "epsilon" else -b

    def forward(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor:
        z = z.float()
        if not self.preconditioned:
            return self._output(z, phi, cond)
        s, a, b = (c.view(-1, 1, 1, 1) for c in self.coefficients(phi))
        return a * z + b * self._output(s * z, phi, cond)

    def _output(self, z: Tensor, phi: Tensor, cond: Any) -> Tensor:
        half = self.dtype == torch.bfloat16
        with torch.autocast(z.device.type, torch.bfloat16, cache_enabled=False) if half else nullcontext():
            output = self.unet(z, self.times(phi), class_labels=cond, return_dict=False)[0]
        return output.float()


def upsample_without_atomics(unet: nn.Module) -> None:
    """Let the U-Net double its resolution as ours do. Not where its blocks call `F.interpolate` themselves (sde_vp)."""
    from diffusers.models.upsampling import Upsample2D

    for module in unet.modules():
        if type(module) is Upsample2D and module.norm is None and not module.use_conv_transpose and module.interpolate:
            module.forward = MethodType(_upsampled, module)


def _upsampled(self: Any, hidden_states: Tensor, output_size: Any = None, *others: Any, **more: Any) -> Tensor:
    if output_size is not None or hidden_states.device.type == "cpu":
        return type(self).forward(self, hidden_states, output_size, *others, **more)
    larger = upsample(hidden_states)
    if not self.use_conv:
        return larger
    return self.conv(larger) if self.name == "conv" else self.Conv2d_0(larger)


def is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def load_pipeline(folder: Path) -> tuple[DiffusersNetwork, ScheduleConfig]:
    """The network of a pipeline's folder, float32 on the CPU, and its schedule. UsageError, in one line, for what is not one
    of a UNet2DModel on pixels."""
    index = read_json(folder / "model_index.json")
    parts = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    parts = {name: value for name, value in parts.items() if any(value)}
    if parts.keys() != {"unet", "scheduler"}:
        raise UsageError(
            f"{folder} is a pipeline of {', '.join(sorted(parts)) or 'nothing'}: only those of a unet and a scheduler, on "
            "pixels, are read (a latent model has a vae or vqvae besides)"
        )
    if parts["unet"] != ["diffusers", "UNet2DModel"]:
        raise UsageError(f"the unet of {folder} is {parts['unet']}: only diffusers' UNet2DModel is read")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler["_class_name"] = parts["scheduler"][1]
    schedule, scheduler, prediction = _schedule(scheduler, f"the scheduler of {folder}")
    where = f"the unet of {folder}"
    config = _config(read_json(folder / "unet" / "config.json"), scheduler, prediction, where)
    if not (folder / "unet" / WEIGHTS).is_file():
        raise UsageError(
            f"{folder / 'unet' / WEIGHTS} is missing: weights are read from safetensors only; load the pipeline in diffusers "
            "and save it with save_pretrained(..., safe_serialization=True)"
        )
    try:
        # Not load_state_dict: older files have other names for the attention's weights.
        with utf8_path(folder / "unet") as named:
            unet = library().UNet2DModel.from_pretrained(
                named,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
            )
    except UsageError:
        raise
    except Exception as error:  # of many kinds, for a configuration or weights that do not fit
        lines = str(error).splitlines() or [type(error).__name__]
        raise UsageError(f"{folder / 'unet'} cannot be loaded: {lines[0]}") from None
    return DiffusersNetwork(config, unet=unet).eval().requires_grad_(False), schedule


def adapt(unet: Any, scheduler: Any) -> tuple[DiffusersNetwork, Schedule]:
    """A UNet2DModel, which stays where it is and keeps its parameters, with our call `network(z, phi, cond)`; and the noise
    schedule that it was trained with.

    scheduler: of the model, for its times and prediction_type. UsageError for networks and schedulers that are not read (see `load_pipeline`).
    """
    if not isinstance(unet, library().UNet2DModel):
        raise UsageError(f"only a UNet2DModel of diffusers can be adapted, not a {type(unet).__name__}")
    if not isinstance(scheduler, library().SchedulerMixin):
        raise UsageError(f"the schedule is that of a scheduler of diffusers, not of a {type(scheduler).__name__}")
    settings = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    schedule, settings, prediction = _schedule(settings, "this scheduler")
    network = DiffusersNetwork(_config(dict(unet.config), settings, prediction, "this unet"), unet=unet)
    network.knots = network.knots.to(unet.device)
    return network, schedule.build()


def _schedule(scheduler: dict[str, Any], where: str) -> tuple[ScheduleConfig, dict[str, Any], Prediction]:
    name = scheduler["_class_name"]
    if name in EDM:
        own = getattr(library(), name)().config  # its defaults, for what is not said
        kept = {key: scheduler.get(key, own[key]) for key in OF_EDM}
        schedule = preconditioning.schedule(kept["sigma_min"], kept["sigma_max"])
        return schedule, {"_class_name": name} | kept, "v"
    if name not in DISCRETE:
        raise UsageError(f"{where} is a {name}: choose one of {', '.join((*DISCRETE, *EDM))}")
    said = scheduler.get("prediction_type", "epsilon")
    if said not in PREDICTIONS:
        raise UsageError(f"{where} has prediction_type {said}: need one of {', '.join(PREDICTIONS)}")
    kept = {key: scheduler[key] for key in OF_THE_TABLE if scheduler.get(key) is not None}
    kept["_class_name"] = name
    try:
        AlphaBars(alpha_bars(kept))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"{where} has no schedule that can be read: {error}") from None
    return ScheduleConfig(name="diffusers", diffusers=kept), kept, PREDICTIONS[said]


def _config(unet: dict[str, Any], scheduler: dict[str, Any], prediction: Prediction, where: str) -> DiffusersConfig:
    unet = {name: value for name, value in unet.items() if not name.startswith("_")}
    size, channels = unet.get("sample_size"), unet.get("in_channels", 3)
    if not isinstance(size, int):
        raise UsageError(f"{where} has sample_size {size}: only square images of a stated size are distilled")
    if unet.get("out_channels", 3) != channels:
        raise UsageError(
            f"{where} has {channels} channels in and {unet.get('out_channels', 3)} out: one that predicts "
            "variances too is not read"
        )
    if unet.get("time_embedding_type", "positional") != "positional":
        raise UsageError(
            f"{where} has time_embedding_type {unet['time_embedding_type']}: only positional ones can be asked "
            "between their times; a pipeline that pdfast wrote is distilled from its run's own folder"
        )
    if unet.get("class_embed_type") is not None:
        raise UsageError(f"{where} has class_embed_type {unet['class_embed_type']}: only plain classes are read")
    return DiffusersConfig(size, channels, prediction, unet.get("num_class_embeds") or 0, unet, scheduler)
