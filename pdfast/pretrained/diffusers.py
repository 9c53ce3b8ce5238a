"""Networks of diffusers pipelines: UNet2DModel under a discrete variance-preserving schedule, or preconditioned as in EDM.

Read offline, from safetensors, and by an allow-list of classes: no code that comes with a model is run.

A discrete schedule has its alpha-bars at times 0..T-1; between them a network is asked at fractional times, linear in the
angle.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn

from pdfast.diffusers_tables import DISCRETE, EDM, MOST_TIMES, alpha_bars, library
from pdfast.diffusion import Prediction
from pdfast.diffusion.schedules import Schedule, table_angles
from pdfast.io.errors import UsageError
from pdfast.io.plain import fields_of
from pdfast.io.reading import read_json, shown
from pdfast.networks import ModelConfig
from pdfast.networks.layers import upsample
from pdfast.networks.wrapped import Autocasted, Wrapping, preconditioning
from pdfast.pretrained.schedulers import DIFFUSERS_PREDICTIONS, check_written_for, read_edm_scheduler, read_scheduler
from pdfast.pretrained.weights import build_with, check_values, read_weights
from pdfast.schedule_config import ScheduleConfig

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS = ("", "fp16", "bf16")
"""Names of variants of the same weights, in the order in which they are looked for."""
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attentions' weights in files of 2022."""
LARGEST, MOST_LAYERS, MOST_LEVELS, MOST_CLASSES = 1 << 16, 64, 16, 1 << 20
MOST_PIXELS = 1 << 13  # on a side


@dataclass(frozen=True)
class DiffusersConfig(ModelConfig):
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
    image_width: int | None = None
    null_label: int | None = None
    guidance: tuple[float, ...] | None = None

    def __hash__(self) -> int:
        return hash(json.dumps([self.unet, self.scheduler]))

    def build(self, dropout: float = 0.0) -> "DiffusersNetwork":
        return DiffusersNetwork(self, dropout)

    def checked(self, where: str) -> Self:
        if self.scheduler.get("_class_name") in EDM:
            scheduler = read_edm_scheduler(self.scheduler, f"{where}: the scheduler")
            predictions: tuple[Prediction, ...] = ("v",)
        else:
            alpha_bars(self.scheduler, f"{where}: the scheduler")
            scheduler, predictions = self.scheduler, tuple(DIFFUSERS_PREDICTIONS.values())
        if self.prediction not in predictions or self != replace(
            _config(self.unet, scheduler, self.prediction, where), guidance=self.guidance
        ):
            raise UsageError(f"{where}: the fields of the network do not fit its unet and its scheduler")
        return self


class DiffusersNetwork(Autocasted):
    """A UNet2DModel with our call, told the times of its scheduler, or preconditioned as in EDM."""

    unet: Any
    knots: Tensor
    """Angles of the times -1 (no noise), 0, ..., T-1: float32 [T + 1]; none where it is told a noise level."""

    def __init__(self, config: DiffusersConfig, dropout: float = 0.0, unet: nn.Module | None = None) -> None:
        """unet: the UNet2DModel, if there is one already."""
        if unet is None:
            unet = library().UNet2DModel.from_config(config.unet | {"dropout": dropout})
            upsample_without_atomics(unet)
        super().__init__(config, unet, _wrapping(config.scheduler), name="unet")
        with torch.device("cpu"):  # a table, even where the network is only to be counted
            discrete = config.scheduler["_class_name"] in DISCRETE
            knots = table_angles(alpha_bars(config.scheduler)).float() if discrete else torch.zeros(0)
        self.register_buffer("knots", knots, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Angles stay float32 where the network is cast."""
        knots = self.knots
        super()._apply(fn, recurse)
        self.knots = knots.to(self.knots.device)
        return self

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

    def label(self, phi: Tensor) -> Tensor:
        """Return what the U-Net was told at angles phi [N] when it was trained: float32 [N]."""
        if not len(self.knots):
            return super().label(phi)
        above = torch.searchsorted(self.knots, phi.contiguous(), right=True).clamp(1, len(self.knots) - 1)
        lower, upper = self.knots[above - 1], self.knots[above]
        return (above - 2 + (phi - lower) / (upper - lower)).clamp(0, len(self.knots) - 2)

    def ask(self, z: Tensor, label: Tensor, cond: Any) -> Tensor:
        z = z.to(self.unet.conv_in.weight.dtype)
        return self.unet(z, label, class_labels=cond, return_dict=False)[0]


def _wrapping(scheduler: dict[str, Any]) -> Wrapping:
    """Return the wrapping of a U-Net that was trained under the scheduler."""
    if scheduler["_class_name"] in DISCRETE:
        return Wrapping()
    sign = 1.0 if scheduler["prediction_type"] == "epsilon" else -1.0
    return preconditioning(scheduler["sigma_data"], scheduler["sigma_min"], sign)


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


@dataclass(frozen=True)
class _UNetArguments:
    """The arguments of UNet2DModel, but for sample_size; its defaults hold for those that are not given."""

    in_channels: int
    out_channels: int
    center_input_sample: bool
    time_embedding_type: str
    time_embedding_dim: int | None
    freq_shift: float
    flip_sin_to_cos: bool
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    mid_block_scale_factor: float
    downsample_padding: int
    downsample_type: str
    upsample_type: str
    dropout: float
    act_fn: str
    attention_head_dim: int | None
    norm_num_groups: int | None
    attn_norm_num_groups: int | None
    norm_eps: float
    resnet_time_scale_shift: str
    add_attention: bool
    class_embed_type: str | None
    num_class_embeds: int | None
    num_train_timesteps: int | None


def is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def load_pipeline(folder: Path) -> tuple[DiffusersNetwork, ScheduleConfig]:
    """Return the network of a pipeline's folder, float32 on the CPU, and its schedule. UsageError, in one line, for what is
    not one of a UNet2DModel on pixels."""
    index = read_json(folder / "model_index.json")
    parts = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    parts = {name: value for name, value in parts.items() if any(value)}
    if parts.keys() != {"unet", "scheduler"}:
        raise UsageError(
            f"{folder} is a pipeline of {', '.join(sorted(parts)) or 'nothing'}: only those of a unet and a scheduler, on "
            "pixels, are read (a latent model has a vae or vqvae besides)"
        )
    if parts["unet"] != ["diffusers", "UNet2DModel"]:
        raise UsageError(f"the unet of {folder} is {shown(parts['unet'])}: only diffusers' UNet2DModel is read")
    if parts["scheduler"][:1] != ["diffusers"] or len(parts["scheduler"]) != 2:
        raise UsageError(f"the scheduler of {folder} is {shown(parts['scheduler'])}: only one of diffusers is read")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", infinite=True)  # as DPM-Solver's clipping is
    name = parts["scheduler"][1]
    if name in (*DISCRETE, *EDM):
        check_written_for(scheduler, name, f"the scheduler of {folder}")
    scheduler["_class_name"] = name
    schedule, scheduler, prediction = read_scheduler(scheduler, f"the scheduler of {folder}")
    config = _config(read_json(folder / "unet" / "config.json"), scheduler, prediction, f"the unet of {folder}")
    weights, where = _read_weights(folder / "unet")
    return build_with(config.build, weights, where), schedule


def adapt(unet: Any, scheduler: Any) -> tuple[DiffusersNetwork, Schedule]:
    """Give a UNet2DModel, which stays where it is and keeps its parameters, our call `network(z, phi, cond)`; return it and the
    noise schedule that it was trained with.

    unet: in float32, or in half precision, in which it is then asked. scheduler: of the model, for its times and
    prediction_type. UsageError for networks and schedulers that are not read (see `load_pipeline`), and for weights that are not
    finite.
    """
    if not isinstance(unet, library().UNet2DModel):
        raise UsageError(f"only a UNet2DModel of diffusers can be adapted, not a {type(unet).__name__}")
    if not isinstance(scheduler, library().SchedulerMixin):
        raise UsageError(f"the schedule is that of a scheduler of diffusers, not of a {type(scheduler).__name__}")
    settings = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in scheduler.config.items()}
    settings["_class_name"] = type(scheduler).__name__
    schedule, settings, prediction = read_scheduler(settings, "this scheduler")
    config = _config(dict(unet.config), settings, prediction, "this unet")
    check_values(unet.named_parameters(), "this unet")
    network = DiffusersNetwork(config, unet=unet)
    network.knots = network.knots.to(unet.device)
    return network, schedule.build()


def _config(unet: dict[str, Any], scheduler: dict[str, Any], prediction: Prediction, where: str) -> DiffusersConfig:
    unet = {name: value for name, value in unet.items() if not name.startswith("_")}
    plain: dict[str, Any] = {name: list(v) if isinstance(v, tuple) else v for name, v in unet.items()}
    size: Any = plain.get("sample_size")
    channels: Any = plain.get("in_channels", 3)
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    if not all(type(side) is int and 1 <= side <= MOST_PIXELS for side in sides):
        raise UsageError(f"{where} has sample_size {shown(size)}: only images of a stated size are distilled")
    height, width = sides
    _check_sizes(fields_of(_UNetArguments, plain, _UNetArguments.__annotations__, where), where)
    if plain.get("out_channels", 3) != channels:
        raise UsageError(
            f"{where} has {channels} channels in and {plain.get('out_channels', 3)} out: one that predicts "
            "variances too is not read"
        )
    if plain.get("time_embedding_type", "positional") != "positional":
        raise UsageError(
            f"{where} has time_embedding_type {plain['time_embedding_type']}: only positional ones can be asked "
            "between their times; a pipeline that pdfast wrote is distilled from its run's own folder"
        )
    if plain.get("class_embed_type") is not None:
        raise UsageError(f"{where} has class_embed_type {plain['class_embed_type']}: only plain classes are read")
    classes = plain.get("num_class_embeds", 0) or 0
    other_width = None if width == height else width
    return DiffusersConfig(height, channels, prediction, classes, unet, scheduler, image_width=other_width)


def _check_sizes(arguments: dict[str, Any], where: str) -> None:
    """Raise a UsageError for what is too large to be a network's, before one is made of it."""
    most = {"layers_per_block": MOST_LAYERS, "num_class_embeds": MOST_CLASSES, "num_train_timesteps": MOST_TIMES}
    least = {"downsample_padding": 0, "num_class_embeds": 0}
    for name, value in arguments.items():
        values = value if isinstance(value, tuple) else (value,)
        if len(values) > MOST_LEVELS:
            raise UsageError(f"{where} has {name} of {len(values)} levels: at most {MOST_LEVELS} are read")
        low, high = least.get(name, 1), most.get(name, LARGEST)
        if any(type(v) is int and not low <= v <= high for v in values):
            raise UsageError(f"{where} has {name} {shown(value)}: need {low} to {high}")


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Read the weights of a unet's folder, in one file or several that an index lists, with the names that they have in
    DiffusersNetwork; the path is for messages."""
    for variant in VARIANTS:
        added = f".{variant}" if variant else ""
        index = folder / INDEX.replace(".json", f"{added}.json")
        if index.is_file():
            weights, where = _read_shards(index), folder
            break
        where = folder / WEIGHTS.replace(".safetensors", f"{added}.safetensors")
        if where.is_file():
            weights = read_weights([where])
            break
    else:
        if others := sorted(file.name for file in folder.glob("*.safetensors")):
            raise UsageError(
                f"{folder} has no {WEIGHTS}, but {', '.join(others[:3])}: give the file with the weights that are wanted that name"
            )
        raise UsageError(
            f"{folder / WEIGHTS} is missing: weights are read from safetensors only; load the pipeline in diffusers "
            "and save it with save_pretrained(..., safe_serialization=True)"
        )
    older = re.compile(rf"(attentions\.\d+\.)({'|'.join(OLDER)})\.")
    return {
        f"unet.{older.sub(lambda found: f'{found[1]}{OLDER[found[2]]}.', name)}": w for name, w in weights.items()
    }, where


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the weights in the files that an index lists, which lie beside it."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UsageError(f"{index} has no weight_map of names and files")
    for file in set(listed.values()):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII):
            raise UsageError(f"{index} lists {shown(file)}: only safetensors in its own folder are read")
        if not (index.parent / file).is_file():
            raise UsageError(f"{index.parent / file} is missing, which {index.name} lists: restore it")
    weights = read_weights([index.parent / file for file in sorted(set(listed.values()))])
    if weights.keys() != listed.keys():
        other = sorted(weights.keys() ^ listed.keys())[0]
        raise UsageError(f"{index} and its files do not have the same weights: {shown(other)} is in one of them only")
    return weights
