"""A model as a pipeline of diffusers, which samples what we do.

The scheduler gets the betas whose alpha-bars are cos^2 of our angles at T times, equally spaced in u, in float64. The
U-Net's time embedding becomes a table of T rows: what ours would have been at each, for any schedule. What UNet2DModel
cannot say (x and eps together, a conversion, EDM's preconditioning) is a combination by time: see `pdfast_unet`, and
`pdfast_edm_unet` for what UNet2DModel is not.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pdfast import networks
from pdfast.diffusers_tables import library
from pdfast.diffusion import outputs_per_channel
from pdfast.diffusion.schedules import Schedule
from pdfast.io.errors import UsageError
from pdfast.io.plain import unstructure
from pdfast.networks import ModelConfig, Network, NetworkConfig, UNet, Wrapped
from pdfast.networks.converted import as_v
from pdfast.networks.edm_unet import EDMUNet, EDMUNetConfig
from pdfast.networks.guided import INPUT
from pdfast.networks.layers import Attention, Conv2d, ResBlock, guidance_embedding, time_embedding
from pdfast.networks.wrapped import Wrapping
from pdfast.pretrained.diffusers import DiffusersNetwork
from pdfast.pretrained.schedulers import DIFFUSERS_PREDICTIONS

LEAST_TIMES = 1024
NAMES = {ours: theirs for theirs, ours in DIFFUSERS_PREDICTIONS.items()}
MODEL_FILES = {"PdfastUNet": ("pdfast_unet",), "PdfastEDMUNet": ("pdfast_edm_unet", "pdfast_unet", "edm_unet")}
"""Of each class that diffusers does not have: its file, and those that this one imports."""


def number_of_times(steps: int) -> int:
    """T, a multiple of the number of steps, at least 8 of which diffusers' rule of steps needs for each."""
    return steps * -(-max(LEAST_TIMES, 8 * steps) // steps)


def betas(schedule: Schedule, times: int) -> Tensor:
    """Of the T times: float64 [T]."""
    u = torch.arange(1, times + 1, dtype=torch.float64) / times
    alpha_bar = torch.cos(schedule.phi(u)) ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return 1 - alpha_bar / before


def write_pipeline(folder: Path, network: Network, schedule: Schedule, steps: int) -> str | None:
    """Write a pipeline's folder; returns the file beside its weights for which it needs `trust_remote_code=True`, where
    there is one. network: one of ours, on the CPU, its weights in float32."""
    diffusers = library()
    times = number_of_times(steps)
    phi = schedule.phi(torch.arange(1, times + 1, dtype=torch.float64) / times).float()
    core, tables = combination(network, phi)
    unet = _unet2d(core, phi) if tables is None else _by_time(network, core, phi, tables)
    kind = type(unet).__name__
    files = MODEL_FILES.get(kind, ())
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=times,
        trained_betas=betas(schedule, times).tolist(),
        prediction_type=NAMES[core.prediction] if tables is None else "v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    unet.eval().save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    for name in files:
        shutil.copy(Path(networks.__file__).with_name(f"{name}.py"), folder / "unet")
    index = {
        # DDIMPipeline never passes classes on.
        "_class_name": "ConsistencyModelPipeline" if network.config.num_classes else "DDIMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": [files[0] if files else "diffusers", kind],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return f"{files[0]}.py" if files else None


def _by_time(network: Network, core: Network, phi: Tensor, tables: tuple[Tensor, Tensor, Tensor]) -> Any:
    """Return the model of one of MODEL_FILES, with the U-Net of `core` inside."""
    named = dict(zip(("input_scale", "of_input", "of_outputs"), tables, strict=True))
    if isinstance(core, Wrapped) and isinstance(core.inner, EDMUNet):
        from pdfast.networks.pdfast_edm_unet import PdfastEDMUNet as Model

        unet = _without_guidance(core.inner)
        arguments = unstructure(unet.config)
        named["noise"] = core.label(phi)
    else:
        from pdfast.networks.pdfast_unet import PdfastUNet as Model

        unet = _unet2d(core, phi)
        arguments = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config = network.config
    whole = Model(
        unet=arguments,
        outputs=tables[2].shape[1],
        num_train_timesteps=len(phi),
        sample_size=sample_size(config),
        in_channels=config.image_channels,
        num_class_embeds=config.num_classes or None,
    )
    whole.core = unet
    for name, table in named.items():
        getattr(whole, name).copy_(table)
    return whole


def combination(network: Network, phi: Tensor) -> tuple[Network, tuple[Tensor, Tensor, Tensor] | None]:
    """(core, (s, a, b)) of output = a z + sum_p b_p core(s z)_p at angles phi [T], s and a [T], b [T, P]; the core alone, and
    None, where its output is meant as it is."""
    core, wrapping = network, Wrapping()
    if isinstance(network, Wrapped):
        core, wrapping = network.inner if isinstance(network.inner, Network) else network, network.wrapping
    elif network.prediction not in NAMES:
        wrapping = as_v(network.prediction)
    if wrapping.coefficients is None:
        return core, None
    s, a, b = wrapping.coefficients(phi)
    return core, (torch.ones_like(phi) if s is None else s, a, b)


def _unet2d(network: Network, phi: Tensor) -> Any:
    if isinstance(network, DiffusersNetwork):
        learned = {"time_embedding_type": "learned", "num_train_timesteps": len(phi)}
        unet = library().UNet2DModel.from_config(network.config.unet | learned)
        weights = network.unet.state_dict() | {"time_proj.weight": network.unet.time_proj(network.label(phi))}
    elif not isinstance(network, UNet):
        raise UsageError("a network made by code of your own has no class in diffusers: write safetensors")
    else:
        unet = library().UNet2DModel(**unet2d_arguments(network.config, len(phi)))
        weights = _weights(network, phi)
    unet.load_state_dict(weights)
    return unet


def sample_size(network: ModelConfig) -> int | list[int]:
    """Return diffusers' size of the images: one number for square ones, else height and width."""
    _, height, width = network.image_shape
    return height if height == width else [height, width]


def unet2d_arguments(network: NetworkConfig, times: int) -> dict[str, Any]:
    """Of the UNet2DModel that is our U-Net."""
    attends = [
        network.image_size >> level in network.attention_resolutions for level in range(len(network.channel_mult))
    ]
    return {
        "sample_size": sample_size(network),
        "in_channels": network.image_channels,
        "out_channels": outputs_per_channel(network.prediction) * network.image_channels,
        "block_out_channels": tuple(network.channels * m for m in network.channel_mult),
        "layers_per_block": network.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends),
        "up_block_types": tuple("AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends)),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": network.head_dim,
        "norm_num_groups": network.num_groups,
        "attn_norm_num_groups": network.num_groups,
        "norm_eps": 1e-6,
        "time_embedding_type": "learned",
        "time_embedding_dim": network.emb_channels,
        "num_train_timesteps": times,
        "num_class_embeds": network.num_classes or None,
    }


def _weights(network: UNet, phi: Tensor) -> dict[str, Tensor]:
    """Return the state of that UNet2DModel."""
    config = network.config
    state = (
        _conv("conv_in", network.conv_in) | _conv("conv_out", network.conv_out) | _as("conv_norm_out", network.norm_out)
    )
    for i, level in enumerate(network.down):
        state |= _level(f"down_blocks.{i}", level, "downsample")
    state |= _res_block("mid_block.resnets.0", network.mid_block1) | _res_block(
        "mid_block.resnets.1", network.mid_block2
    )
    state |= _attention("mid_block.attentions.0", network.mid_attention)
    for i, level in enumerate(network.up):
        state |= _level(f"up_blocks.{i}", level, "upsample")
    # As wide as the first level; what is beyond the embedding multiplies nothing.
    beyond = config.channels * config.channel_mult[0] - config.channels
    state |= _as("time_embedding.linear_1", network.time_mlp[0]) | _as("time_embedding.linear_2", network.time_mlp[2])
    state["time_proj.weight"] = time_embedding(phi, config.channels)
    if network.guidance is not None:
        state["time_proj.weight"] += network.guidance(guidance_embedding(_guidance(config), config.channels))
    for name in ("time_proj.weight", "time_embedding.linear_1.weight"):
        state[name] = nn.functional.pad(state[name], (0, beyond))
    if network.class_embedding is not None:
        state["class_embedding.weight"] = network.class_embedding.weight.T + network.class_embedding.bias
    return state


def _guidance(config: NetworkConfig | EDMUNetConfig) -> Tensor:
    """Return g, float32 [1], at which a network that takes it as an input is exported: the middle of its range."""
    assert config.guidance is not None
    return torch.tensor([sum(config.guidance) / len(config.guidance)])


def _without_guidance(unet: EDMUNet) -> EDMUNet:
    """Return the U-Net with the guidance that is an input in the biases of its first layer."""
    if unet.guidance is None:
        return unet
    plain = EDMUNet(replace(unet.config, guidance=None))
    state = {name: w for name, w in unet.state_dict().items() if not name.startswith(f"{INPUT}.")}
    added = unet.map_layer0.weight @ unet.guidance(unet.waves(_guidance(unet.config) - 1))[0]
    plain.load_state_dict(state | {"map_layer0.bias": unet.map_layer0.bias + added})
    return plain


def _as(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _conv(name: str, conv: Conv2d) -> dict[str, Tensor]:
    return {f"{name}.weight": rearrange(conv.weight, "o h w i -> o i h w").contiguous(), f"{name}.bias": conv.bias}


def _level(name: str, level: Any, resampler: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, (block, attention) in enumerate(zip(level["blocks"], level["attentions"], strict=True)):
        state |= _res_block(f"{name}.resnets.{i}", block)
        if isinstance(attention, Attention):
            state |= _attention(f"{name}.attentions.{i}", attention)
    if resampler in level:
        state |= _res_block(f"{name}.{resampler}rs.0", level[resampler])
    return state


def _res_block(name: str, block: ResBlock) -> dict[str, Tensor]:
    state = _as(f"{name}.norm1", block.norm1) | _conv(f"{name}.conv1", block.conv1) | _as(f"{name}.norm2", block.norm2)
    state |= _conv(f"{name}.conv2", block.conv2) | _as(f"{name}.time_emb_proj", block.film)
    if isinstance(block.shortcut, Conv2d):
        state |= _conv(f"{name}.conv_shortcut", block.shortcut)
    return state


def _attention(name: str, attention: Attention) -> dict[str, Tensor]:
    state = _as(f"{name}.group_norm", attention.norm) | _as(f"{name}.to_out.0", attention.proj)
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    for part, weight, bias in zip("qkv", weights, biases, strict=True):
        state |= {f"{name}.to_{part}.weight": weight, f"{name}.to_{part}.bias": bias}
    return state
