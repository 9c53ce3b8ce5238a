"""`accelerate`: puts the kernels into a model of another codebase, in place; `restore` takes them out again.

    report = accelerate(model)      print(report) names what was replaced, and what was left, with the reason
    restore(model)                  the same model as before

    what is recognised                                                 what runs then
    nn.GroupNorm, and subclasses with its forward                      group_norm
    nn.Sequential with a SiLU after a GroupNorm                        group_norm with SiLU
    diffusers' ResnetBlock2D, "default" and "scale_shift"              group_norm with SiLU, and FiLM in "scale_shift"
    diffusers' Attention of a tensor with itself, without mask         group_norm, its own projections, attention
    conv_norm_out, conv_act of UNet2DModel and UNet2DConditionModel    group_norm with SiLU

Only `forward` is set, on instances. Classes, parameters, buffers, hooks and state-dict keys stay, and so does what is
done with them: load_state_dict, .to(), deepcopy, checkpointing, functional_call, torch.compile, train and eval. A
model that was pickled comes back restored. Nothing is imported to recognise a class: it is known by its qualified
name, and by the names that its forward uses. Where those are others than in the versions seen (diffusers 0.27 to
0.42), it is left.
"""

import inspect
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from pdfast_kernels import _forwards
from pdfast_kernels._forwards import code_names, instance_forward, is_silu, qualified_name, why_not_fused

_GROUP_NORM = "torch.nn.modules.normalization.GroupNorm"
_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_BLOCKS: dict[str, Any] = {
    _SEQUENTIAL: _forwards.Sequential,
    "diffusers.models.resnet.ResnetBlock2D": _forwards.ResnetBlock2D,
    "diffusers.models.attention_processor.Attention": _forwards.Attention,
}
_UNETS = (
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
)
_PAIR: tuple[Any, ...] = (_forwards.GroupNormSiLU, _forwards.PassedThrough)
_KINDS: dict[Any, str] = {new.forward: new.kind for new in (_forwards.GroupNorm, *_BLOCKS.values(), *_PAIR)}


@dataclass
class Report:
    """What `accelerate` did. Names are those of `named_modules`; "" is the module itself."""

    replaced: list[tuple[str, str]] = field(default_factory=list)
    """(name, kind) of each module with another forward."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each that looks as if it could run kernels, and does not."""
    already: list[tuple[str, str]] = field(default_factory=list)
    """(name, kind) of each that ran them before."""

    def __str__(self) -> str:
        replaced, left, before = len(self.replaced), len(self.left), len(self.already)
        lines = [f"{replaced} modules replaced, {left} left, {before} ran kernels before"]
        for title, entries in (("replaced", self.replaced), ("left", self.left), ("before", self.already)):
            alike = Counter((re.sub(r"\b\d+\b", "*", name) or "(itself)", text) for name, text in entries)
            lines += [f"{title}:"] if alike else []
            lines += [f"    {count:3} x {name}: {text}" for (name, text), count in alike.items()]
        return "\n".join(lines)


def _forward_class(module: nn.Module) -> str:
    """The class whose forward `module` has: a subclass that does not override it counts as its base."""
    return next(qualified_name(cls) for cls in type(module).__mro__ if "forward" in vars(cls))


def _calls_group_norm(module: nn.Module) -> bool:
    """Whether its class's forward calls our group norms itself."""
    forward = inspect.unwrap(type(module).forward)
    names = code_names(forward)
    for value in (getattr(forward, "__globals__", {}).get(name) for name in names):
        if isinstance(value, FunctionType) and str(value.__module__).startswith("pdfast_kernels.group_norm"):
            return True
        if isinstance(value, ModuleType) and value.__name__ == "pdfast_kernels":
            return any(name.startswith("group_norm") for name in names)
    return False


def _set_forward(module: nn.Module, new: Any) -> None:
    module.forward = MethodType(new.forward, module)  # a bound method, which deepcopy binds to the copy


def _accelerate(name: str, module: nn.Module, new: Any, report: Report) -> None:
    function = instance_forward(module)
    if function in _KINDS:
        report.already.append((name, _KINDS[function]))
    elif function is not None:
        report.left.append((name, "its forward was set by somebody else"))
    elif reason := new.why_not(module):
        report.left.append((name, reason))
    else:
        _set_forward(module, new)
        report.replaced.append((name, new.kind))


def _accelerate_end(name: str, unet: Any, uses: Counter, report: Report) -> None:
    """conv_norm_out and conv_act, which the forward of the whole network calls."""
    norm, activation = unet.conv_norm_out, unet.conv_act
    norm_name, activation_name = (f"{name}.{part}".lstrip(".") for part in ("conv_norm_out", "conv_act"))
    if norm is None or not is_silu(activation):
        return
    if instance_forward(norm) is _forwards.GroupNormSiLU.forward:
        report.already.append((activation_name, _forwards.PassedThrough.kind))
        return
    reason: str | None
    if ("conv_norm_out", "conv_act") not in pairwise(code_names(type(unet).forward)):
        reason = f"{type(unet).__name__}.forward is of an unknown version"
    elif uses[norm] > 1 or uses[activation] > 1:
        reason = "GroupNorm and SiLU stay apart: one is used elsewhere as well"
    else:
        reason = why_not_fused(norm, activation)
    if reason:
        report.left.append((activation_name, reason))
        return
    _set_forward(norm, _forwards.GroupNormSiLU)
    _set_forward(activation, _forwards.PassedThrough)
    report.replaced[:] = [entry for entry in report.replaced if entry[0] != norm_name]
    report.replaced += [(norm_name, _forwards.GroupNormSiLU.kind), (activation_name, _forwards.PassedThrough.kind)]


def accelerate(module: nn.Module) -> Report:
    """Let `module` and all in it run the kernels wherever it is recognised. A second call changes nothing.

    Call it after hooks have been registered, and before torch.compile and wrappers that set a forward.
    """
    report = Report()
    modules = list(module.named_modules())
    done = set()
    for name, part in modules:
        if _calls_group_norm(part):
            report.already.append((name, "calls pdfast_kernels itself"))
            done.update([part, *part.children()])  # it reads the parameters of a norm in it
    for name, part in modules:
        if isinstance(part, nn.GroupNorm) and part not in done:
            if _forward_class(part) == _GROUP_NORM:
                _accelerate(name, part, _forwards.GroupNorm, report)
            else:
                report.left.append((name, f"{type(part).__name__} has a forward of its own"))
    uses = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    for name, part in modules:  # after their norms, which they call
        block = _forward_class(part)
        if block in _UNETS:
            _accelerate_end(name, part, uses, report)
        elif block in _BLOCKS and (block != _SEQUENTIAL or _forwards.Sequential.pairs(part)):
            _accelerate(name, part, _BLOCKS[block], report)
    return report


def restore(module: nn.Module) -> None:
    """Undo `accelerate` in `module` and all in it. ValueError for one of two modules that only work together."""
    if instance_forward(module) in [new.forward for new in _PAIR]:
        raise ValueError("restore: this module and its neighbour are fused: restore the network that holds both")
    for part in module.modules():
        if instance_forward(part) in _KINDS:
            del part.forward
