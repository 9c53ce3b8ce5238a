"""Networks of EDM (Karras et al. 2022) in the authors' own format, made a folder by examples/edm_weights.py:

    config.json          {"format": "edm-1", "class_name": "EDMPrecond", "init_kwargs": {what it was made with}}
    model.safetensors    its state_dict

The authors' files are pickles, which run code when they are read: they are not read here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pdfast.diffusion import Prediction
from pdfast.io.errors import UsageError
from pdfast.io.plain import structure
from pdfast.networks import Wrapped, WrapperConfig
from pdfast.networks.edm_unet import EDMUNet, EDMUNetConfig
from pdfast.networks.wrapped import preconditioning
from pdfast.pretrained.sigmas import SIGMAS, check_sigmas, sigma_schedule
from pdfast.pretrained.weights import build_with, check_values, read_weights
from pdfast.schedule_config import ScheduleConfig

FORMAT = "edm-1"
WEIGHTS = "model.safetensors"
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of the authors' sampler, for networks that set no limits
SCRIPT = "examples/edm_weights.py"
FREQUENCIES = "model.map_noise.freqs"
DEFAULT_ARCHITECTURE = "DhariwalUNet"
DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_type": "SongUNet",
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
    },
    "DhariwalUNet": {
        "model_type": "DhariwalUNet",
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}


@dataclass(frozen=True)
class InitKwargs:
    """Of the authors' EDMPrecond and of its network, with their names and defaults (for the others see DEFAULTS)."""

    model_type: Literal["SongUNet", "DhariwalUNet"]
    img_resolution: int
    img_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    label_dim: int = 0
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    sigma_data: float = 0.5
    channel_mult_emb: int = 4
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "residual"] = "standard"
    decoder_type: Literal["standard"] = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    label_dropout: float = 0.0
    """Above 0 it was trained without its class too, and can be guided."""
    # What matters only where such a network is trained: labels of augmentations are 0 in sampling.
    use_fp16: bool = False
    augment_dim: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 <= sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        check_sigmas(*self.sigmas, self.sigma_data)

    @property
    def sigmas(self) -> tuple[float, float]:
        """sigma_min and sigma_max: the network's limits, within those of the authors' sampler."""
        return max(self.sigma_min, SIGMA_MIN), min(self.sigma_max, SIGMA_MAX)

    def config(self, frequencies: tuple[float, ...]) -> "EDMConfig":
        """frequencies: of the Fourier embedding, where that is the network's; from its weights."""
        unet = EDMUNetConfig(
            model_type=self.model_type,
            image_size=self.img_resolution,
            image_channels=self.img_channels,
            num_classes=self.label_dim,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            channel_mult_emb=self.channel_mult_emb,
            num_blocks=self.num_blocks,
            attn_resolutions=self.attn_resolutions,
            channel_mult_noise=self.channel_mult_noise,
            residual=self.encoder_type == "residual",
            resample_filter=self.resample_filter,
            fourier=frequencies,
            null_label=self.label_dim if self.label_dim and self.label_dropout > 0 else None,
        )
        return EDMConfig(unet, sigma_min=self.sigmas[0], sigma_data=self.sigma_data)


@dataclass(frozen=True)
class EDMConfig(WrapperConfig):
    """A U-Net of EDM with its preconditioning."""

    unet: EDMUNetConfig
    sigma_min: float
    sigma_data: float
    inner_field: ClassVar[str] = "unet"
    kind: str = "edm"
    prediction: Prediction = "v"

    def __post_init__(self) -> None:
        if self.prediction != "v":
            raise ValueError(f"a network with EDM's preconditioning predicts v, not {self.prediction}")
        check_sigmas(self.sigma_min, SIGMAS[1], self.sigma_data)

    def build(self, dropout: float = 0.0) -> Wrapped:
        """EDMPrecond with our call: it predicts v. Without `cond` a network that knows classes is told none."""
        wrapping = preconditioning(self.sigma_data, self.sigma_min)
        return Wrapped(self, EDMUNet(self.unet, dropout), wrapping, name="model")


def is_pickle(path: Path) -> bool:
    """Tell whether it is a file of the authors' own, or a folder of such files and of nothing else that could be read."""
    read = ("config.json", "model_index.json", "config.yaml")
    return path.suffix == ".pkl" or (any(path.glob("*.pkl")) and not any((path / name).exists() for name in read))


def init_kwargs(meta: dict[str, Any], where: str) -> InitKwargs:
    """Of a config.json. UsageError for one of another network."""
    if meta.get("class_name") != "EDMPrecond":
        raise UsageError(f"{where} is of a network in {meta.get('class_name')}: only EDMPrecond is read")
    given = meta.get("init_kwargs", {})
    if isinstance(given, dict):
        given = DEFAULTS.get(str(given.get("model_type", DEFAULT_ARCHITECTURE)), {}) | given
    return structure(InitKwargs, given, where)


def load_edm(folder: Path, meta: dict[str, Any]) -> tuple[Wrapped, ScheduleConfig]:
    """Return the network of a folder whose config.json is `meta`, float32 on the CPU, and its schedule. UsageError, in one
    line, for what is not one that was preconditioned as EDM's."""
    kwargs = init_kwargs(meta, str(folder / "config.json"))
    file = folder / WEIGHTS
    if not file.is_file():
        raise UsageError(f"{file} is missing: write the folder again with {SCRIPT}")
    weights = read_weights([file])
    frequencies: tuple[float, ...] = ()
    if kwargs.embedding_type == "fourier":
        if FREQUENCIES not in weights:
            raise UsageError(f"{file} does not fit its config.json: {FREQUENCIES} missing")
        check_values([(FREQUENCIES, weights[FREQUENCIES])], file)
        frequencies = tuple(weights[FREQUENCIES].flatten().tolist())
    try:
        config = kwargs.config(frequencies)
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from None
    network = build_with(config.build, {name: w for name, w in weights.items() if _is_learned(name)}, file)
    return network, sigma_schedule(*kwargs.sigmas)


def _is_learned(name: str) -> bool:
    """Keep the weights that are needed: the others follow from the configuration, or are of use only while such a network is trained."""
    return name != FREQUENCIES and not name.endswith((".resample_filter", ".map_augment.weight"))
