"""Networks made by a function of the user's own (`pdfast.own_code`), with the weights that it gave them or a folder's."""

import copy
import functools
import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pdfast import own_code
from pdfast.diffusion import Prediction, check_output
from pdfast.io.errors import RunError, UsageError
from pdfast.networks import ModelConfig
from pdfast.networks.wrapped import Autocasted, Wrapping
from pdfast.own_code import NAME, OwnCode, given, located
from pdfast.pretrained.weights import check_values
from pdfast.schedule_config import ScheduleConfig

TRIED_AT = (0.3, 1.2)  # angles


@dataclass(frozen=True)
class ModuleConfig(ModelConfig):
    """A network that a function makes; what it is, by which it is known again."""

    function: str
    """package.module:function."""
    image_size: int
    image_channels: int
    prediction: Prediction
    num_classes: int = 0
    kind: str = "module"
    image_width: int | None = None
    null_label: int | None = None
    guidance: tuple[float, ...] | None = None
    runs_on_meta: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.function):
            raise ValueError("function is not the name of one, package.module:function")

    def build(self, dropout: float = 0.0) -> "ModuleNetwork":
        """Return the function's network, with the weights that it gave it."""
        return ModuleNetwork(self, _copied(given(self.function, "the network"), dropout), Wrapping())

    def checked(self, where: str) -> Self:
        own = given(self.function, f"{where}: the network")
        check_network(own)
        now = config_of(own)
        for name in ("prediction", "image_shape", "num_classes", "null_label"):
            if getattr(now, name) != getattr(self, name):
                raise UsageError(
                    f"{where}: the network has {name} {getattr(self, name)}, that of {own.name} has {getattr(now, name)}: name "
                    "the function that made it"
                )
        return self


class ModuleNetwork(Autocasted):
    """The function's network. RunError, in one line, where it fails in the middle; what PyTorch raises, such as for memory, is left as
    it is."""

    def ask(self, z: Tensor, label: Tensor, cond: Any) -> Tensor:
        try:
            return self.inner(z, label, cond)
        except RuntimeError:
            raise
        except Exception as error:
            raise RunError(str(located(self.config.function, error))) from None


def config_of(own: OwnCode) -> ModuleConfig:
    """Return the configuration of the function's network."""
    channels, height, width = own.teacher.image_shape
    teacher, other_width = own.teacher, None if width == height else width
    return ModuleConfig(
        own.name,
        height,
        channels,
        teacher.prediction,
        teacher.num_classes,
        image_width=other_width,
        null_label=teacher.null_label,
    )


def load_function(name: str) -> tuple[ModuleNetwork, ScheduleConfig]:
    """Return the teacher of a function that the command line named, float32 on the CPU, and its schedule. UsageError, in one
    line, where it cannot be distilled."""
    own = given(name, "this teacher")
    check_network(own)
    angles = own_code.angles_of(own.name, own.teacher.schedule)
    network = config_of(own).build().eval().requires_grad_(False)
    return network, ScheduleConfig(name="module", module=own.name, angles=angles)


def weights_hash(network: nn.Module) -> str:
    """Return hexadecimal SHA-256 of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + content.tobytes())
    return digest.hexdigest()


def _copied(own: OwnCode, dropout: float) -> nn.Module:
    """Return a copy of the function's network to train: float32 on the CPU. Buffers are the function's, in no file of
    weights."""
    try:
        network = copy.deepcopy(own.teacher.network).to("cpu", torch.float32)
    except Exception as error:
        raise located(own.name, error) from None
    for module in network.modules():
        module._non_persistent_buffers_set.update(module._buffers)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = dropout
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    return network.requires_grad_(True)


@functools.cache
def check_network(own: OwnCode) -> None:
    """Raise a UsageError where the function's network has weights that cannot be trained and written, or does not put out what its
    prediction is."""
    network = _copied(own, 0.0)
    named = list(network.named_parameters(remove_duplicate=False))
    if not named:
        raise UsageError(f"{own.name}: its network has no parameters: there is nothing to distill into")
    check_values(named, own.name)
    seen: dict[int, str] = {}
    for name, parameter in named:
        if other := seen.setdefault(parameter.untyped_storage().data_ptr(), name) if parameter.numel() else None:
            if other != name:
                raise UsageError(
                    f"{own.name}: {other} and {name} of its network are the same weights: give each its own"
                )
    for phi in TRIED_AT:
        z = torch.zeros(2, *own.teacher.image_shape)
        cond: Tensor | None = torch.zeros(2, dtype=torch.int64) if own.teacher.num_classes else None
        try:
            with torch.no_grad():
                output = network.eval()(z, torch.full((2,), phi), cond)
        except Exception as error:
            raise located(own.name, error) from None
        try:
            check_output(f"the network of {own.name}", output, z, own.teacher.prediction)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from None
