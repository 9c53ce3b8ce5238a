"""How much of a model's normalising, activating and attending runs kernels, and what does the rest: for the report of
`accelerate`."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdfast_kernels.integrate import forwards
from pdfast_kernels.integrate.recognition import code_names, instance_forward
from pdfast_kernels.ops.attention import reference as attention
from pdfast_kernels.ops.group_norm import reference as group_norm
from pdfast_kernels.ops.group_norm_attention import reference as group_norm_attention
from pdfast_kernels.runtime import dispatch

Modules = Sequence[tuple[str, nn.Module]]
KINDS_OF_WORK = ("norm", "activation", "attention")

# Functions that a forward calls, by the last part of their names, with or without a _ at its end.
_FUNCTIONS = {
    "norm": "group_norm layer_norm batch_norm instance_norm rms_norm",
    "activation": "silu swish sigmoid gelu mish relu leaky_relu elu hardswish softplus",
    "attention": "scaled_dot_product_attention softmax multi_head_attention_forward memory_efficient_attention flash_attn_func",
}
_KIND_OF_FUNCTION = {name: kind for kind, names in _FUNCTIONS.items() for name in names.split()}
_MODULES: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("attention", (nn.MultiheadAttention,)),
    (
        "norm",
        (
            *(nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm, nn.LocalResponseNorm),
            nn.CrossMapLRN2d,
        ),
    ),
    (
        "activation",
        (nn.SiLU, nn.GELU, nn.ReLU, nn.ReLU6, nn.Mish, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Softplus),
    ),
)


class Share(NamedTuple):
    """Of the work of one kind, how much runs kernels."""

    taken: int
    total: int
    unit: str

    def __str__(self) -> str:
        share = f", {self.taken / self.total:.0%}" if self.total else ""
        return f"{self.taken:,} of {self.total:,} {self.unit}{share}"


def _work(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(kind of work, how it is done) for what a module's own forward does, as far as its code shows."""
    for kind, classes in _MODULES:
        if isinstance(module, classes):
            yield kind, type(module).__name__
            return
    if type(module).__module__.startswith("torch.nn."):
        return
    functions = [instance_forward(module) or type(module).forward]
    if processor := getattr(module, "processor", None):  # of diffusers' Attention
        functions.append(type(processor).__call__)
    found: dict[str, str] = {}
    for name in _names(functions, type(module)):
        kind = _KIND_OF_FUNCTION.get(name.rstrip("_").lower(), "")
        found.setdefault(kind, f"{type(module).__name__} ({name})")
    yield from ((kind, how) for kind, how in found.items() if kind)


def _names(functions: Iterable[Any], cls: type) -> Iterator[str]:
    """Yield the names that functions use, and those that the functions and methods they call use."""
    for function in functions:
        globals_of = getattr(function, "__globals__", {})
        for name in code_names(function):
            yield name
            called = globals_of.get(name) or getattr(cls, name, None)
            if callable(called) and not isinstance(called, type):
                yield from code_names(called)


def _taken_activations(modules: Modules, runs: set[nn.Module]) -> set[nn.Module]:
    """Return the activations that run in a kernel, with the norm before them."""
    taken: set[nn.Module] = set()
    for _, module in modules:
        if module not in runs:
            continue
        part: Any = module
        if isinstance(part, nn.Sequential):
            taken.update(
                silu for norm, silu in forwards.Sequential.pairs(part) if forwards.why_not_fused(norm, silu) is None
            )
        elif forwards.UNet.has_end(part):
            taken.add(part.conv_act)
        elif isinstance(silu := getattr(part, "nonlinearity", None), nn.Module):
            taken.add(silu)
    return taken


def shares_by_modules(modules: Modules, runs: set[nn.Module]) -> dict[str, Share]:
    """Return the shares by how many modules there are that work; runs: those that run kernels."""
    taken, total = Counter[str](), Counter[str]()
    runs = runs | _taken_activations(modules, runs)
    for _, module in modules:
        for kind, _ in _work(module):
            total[kind] += 1
            taken[kind] += module in runs
    return {kind: Share(taken[kind], total[kind], "modules") for kind in KINDS_OF_WORK}


def unknown_work(modules: Modules, runs: set[nn.Module]) -> list[tuple[str, str]]:
    """(name, how it works) of the modules that do not run kernels."""
    runs = runs | _taken_activations(modules, runs)
    return [(name, how) for name, module in modules if module not in runs for _, how in _work(module)]


class _Counted(TorchDispatchMode):
    """Counts the elements that are normalised and activated, and the scores of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.taken = Counter[str](), Counter[str]()
        self.ours = 0
        """Calls of our operations that are under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].strip("_")
        first = result[0] if isinstance(result, tuple | list) else result
        work = first.numel() if isinstance(first, torch.Tensor) else 0
        if "dot_product" in name:
            kind, work = "attention", args[0].shape[:-1].numel() * args[1].shape[-2]
        elif re.search("(group|layer|batch|rms)_norm", name):
            kind = "norm"
        else:
            kind = "attention" if re.fullmatch("(safe_)?softmax", name) else _KIND_OF_FUNCTION.get(name, "")
        self.total[kind] += work
        self.taken[kind] += work if self.ours else 0
        return result


_REFERENCES = (
    (group_norm, "group_norm"),
    (attention, "attention"),
    (attention, "attention_packed"),
    (group_norm_attention, "group_norm_attention"),
)


@contextmanager
def _marked(counted: _Counted) -> Iterator[None]:
    """Within it, our operations run in PyTorch and say so to `counted`."""
    before = {(module, name): getattr(module, name) for module, name in _REFERENCES}

    def marking(function: Callable) -> Callable:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            counted.ours += 1
            try:
                return function(*args, **kwargs)
            finally:
                counted.ours -= 1

        return marked

    try:
        for (module, name), function in before.items():
            setattr(module, name, marking(function))
        with dispatch.use("reference"):
            yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def shares_by_elements(module: nn.Module, example: Sequence[Any] | Mapping[str, Any]) -> dict[str, Share]:
    """Return the shares of one call with these arguments."""
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    training = {part: part.training for part in module.modules()}
    counted = _Counted()
    module.eval()
    try:
        with torch.no_grad(), _marked(counted), counted:
            module(*args, **kwargs)
    finally:
        for part, mode in training.items():
            part.training = mode
    unit = {"attention": "scores"}
    return {kind: Share(counted.taken[kind], counted.total[kind], unit.get(kind, "elements")) for kind in KINDS_OF_WORK}
