"""Weights from safetensors: all that a network has and nothing else, of its shapes, of a floating dtype, and finite."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pdfast.io.errors import UsageError
from pdfast.io.names import utf8_path

N = TypeVar("N", bound=nn.Module)
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
NAMED = 3  # of what is wrong
UNREADABLE = (SafetensorError, RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError)


def in_one_line(error: BaseException) -> str:
    """Return the message of an exception of another library, in one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_weights(files: Sequence[Path], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read the tensors of the files, of any dtype. UsageError for a file that is damaged, and for a name that is in two."""
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            with utf8_path(file) as named, safe_open(named, framework="pt", device=str(device)) as opened:
                read = {name: opened.get_tensor(name) for name in opened.keys()}
        except UNREADABLE as error:
            raise UsageError(f"{file} cannot be read as safetensors: {in_one_line(error)}") from None
        if twice := weights.keys() & read.keys():
            raise UsageError(f"{file} has {_listed(twice)}, which another of its index has too")
        weights |= read
    return weights


def check_values(weights: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Raise a UsageError where a weight is of another dtype than float32, float16 or bfloat16, or not finite."""
    weights = list(weights)
    other = [f"{name} of {str(w.dtype).removeprefix('torch.')}" for name, w in weights if w.dtype not in FLOATING]
    if other:
        raise UsageError(f"{where} has {_listed(other)}: weights are float32, float16 or bfloat16")
    spoilt = [name for name, weight in weights if not bool(torch.isfinite(weight).all())]
    if spoilt:
        raise UsageError(
            f"{where} has NaN or infinite weights, in {_listed(spoilt)}: the training that made it diverged, or the file is "
            "damaged; give another"
        )


def check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: object) -> None:
    """Raise a UsageError where the weights have other names or shapes than the network's state."""
    differ = []
    if lacking := expected.keys() - weights.keys():
        differ.append(f"{_listed(lacking)} missing")
    if more := weights.keys() - expected.keys():
        differ.append(f"{_listed(more)} unknown to the network")
    shapes = [
        f"{name} is {list(weights[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if shapes:
        differ.append(_listed(shapes))
    if differ:
        raise UsageError(f"{where} does not fit its config.json: {'; '.join(differ)}")


def build_with(build: Callable[[], N], weights: Mapping[str, Tensor], where: object) -> N:
    """Build the network with these weights, in float32 on their device, in eval mode and without gradients. UsageError unless
    they are its own.

    Nothing is allocated before they are compared. What is in no state_dict is as `build` makes it.
    """
    try:
        with torch.device("meta"):
            network = build()
    except UsageError:
        raise
    except Exception as error:  # of many kinds, for sizes that do not fit each other
        raise UsageError(
            f"{where} cannot be loaded: no network can be made of its config.json: {in_one_line(error)}"
        ) from None
    check_fit(weights, network.state_dict(), where)
    check_values(weights.items(), where)
    network.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    if any(buffer.is_meta for buffer in network.buffers()):
        for module, made in zip(network.modules(), build().modules(), strict=True):
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = made._buffers[name]
    return network.eval().requires_grad_(False)


def _listed(names: Iterable[str]) -> str:
    """List names in a message: the first few, and how many more there are."""
    names = sorted(names) if not isinstance(names, list) else names
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name[:150] for name in names[:NAMED]) + more
