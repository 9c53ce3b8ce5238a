"""`accelerate`: puts the kernels into a model of another codebase, in place; `restore` takes them out again.

    report = accelerate(model)      print(report) names what was replaced, and what was left, with the reason
    restore(model)                  the same model as before

    what is recognised                                                 what runs then
    nn.GroupNorm; subclasses with its forward, or one that only casts  group_norm
    nn.Sequential with a SiLU after a GroupNorm                        group_norm with SiLU
    diffusers' ResnetBlock2D, "default" and "scale_shift"              group_norm with SiLU, and FiLM in "scale_shift"
    diffusers' Attention of a tensor with itself, without mask         group_norm, its own projections, attention
    conv_norm_out, conv_act of UNet2DModel and UNet2DConditionModel    group_norm with SiLU, within the network's own forward

Only `forward` is set, on instances. Classes, parameters, buffers, hooks and state-dict keys stay, and so does what is
done with them: load_state_dict, .to(), deepcopy, checkpointing, functional_call, vmap, torch.compile, torch.export, train
and eval. A model that was pickled comes back restored, and
torch.jit.script needs one that is. Nothing is
imported to recognise a class: it is known by its qualified name, by where the code of its forward is from, and by the names
which that uses. Where those are others than in the versions seen (diffusers 0.27 to 0.42), or the forward is somebody
else's, on the class or on the instance, it is left.
"""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from pdfast_kernels.integrate import forwards
from pdfast_kernels.integrate.coverage import Share, shares_by_elements, shares_by_modules, unknown_work
from pdfast_kernels.integrate.recognition import code_names, forward_class, instance_forward, qualified_name
from pdfast_kernels.ops.group_norm.group_norm import group_norm

_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_BLOCKS: dict[str, Any] = {
    _SEQUENTIAL: forwards.Sequential,
    "diffusers.models.resnet.ResnetBlock2D": forwards.ResnetBlock2D,
    "diffusers.models.attention_processor.Attention": forwards.Attention,
}
_UNETS = (
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
)
_KINDS: dict[Any, str] = {new.forward: new.kind for new in (forwards.GroupNorm, *_BLOCKS.values())}
_OURS = "calls pdfast_kernels itself"
_GROUP_NORMS = f"{__name__.removesuffix('.integrate.accelerate')}.ops.group_norm"
"""What the modules of the group norms begin with, by whichever name this package is imported."""


@dataclass
class Report:
    """What `accelerate` did. Names are those of `named_modules`; "" is the module itself."""

    replaced: list[tuple[str, str]] = field(default_factory=list)
    """(name, kind) of each module with another forward."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each that looks as if it could run kernels, and does not."""
    already: list[tuple[str, str]] = field(default_factory=list)
    """(name, kind) of each that ran them before."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
    """(name, what it is) of each that normalises, activates or attends by code which is not recognised."""
    shares: dict[str, Share] = field(default_factory=dict)
    """How much of the work runs kernels now, of `norm`, `activation` and `attention`."""

    def __str__(self) -> str:
        replaced, left, before = len(self.replaced), len(self.left), len(self.already)
        lines = [
            f"{replaced} modules replaced, {left} left, {before} ran kernels before, {len(self.unknown)} not understood"
        ]
        lines += [f"{kind}: {share}" for kind, share in self.shares.items()]
        for title, of_title in {"replaced": self.replaced, "left": self.left, "before": self.already}.items():
            alike = Counter((re.sub(r"\b\d+\b", "*", name) or "(itself)", text) for name, text in of_title)
            lines += [f"{title}:"] if alike else []
            lines += [f"    {count:3} x {name}: {text}" for (name, text), count in alike.items()]
        lines += ["not understood:"] if self.unknown else []
        first = dict(reversed([(what, name or "(itself)") for name, what in self.unknown]))
        lines += [
            f"    {count:3} x {what}, as {first[what]}" for what, count in Counter(w for _, w in self.unknown).items()
        ]
        return "\n".join(lines)


def _calls_group_norm(module: nn.Module) -> bool:
    """Tell whether its class's forward calls our group norms itself."""
    forward = inspect.unwrap(type(module).forward)
    names, globals_of = code_names(forward), getattr(forward, "__globals__", {})
    for value in (globals_of.get(name) for name in names):
        if isinstance(value, FunctionType) and str(value.__module__).startswith(_GROUP_NORMS):
            return True
        if isinstance(value, ModuleType) and getattr(value, "group_norm", None) is group_norm:
            return any(name.startswith("group_norm") for name in names)
    return False


def _accelerate(name: str, module: nn.Module, new: Any, report: Report) -> None:
    function = instance_forward(module)
    if function in _KINDS:
        report.already.append((name, _KINDS[function]))
    elif function is not None:
        report.left.append((name, "its forward was set by somebody else"))
    elif reason := new.why_not(module):
        report.left.append((name, reason))
    else:
        if new is forwards.UNet:
            forward = new.around(type(module).forward)
            _KINDS[forward] = new.kind
        else:
            forward = new.forward
        module.forward = MethodType(forward, module)  # a bound method, which deepcopy binds to the copy
        report.replaced.append((name, new.kind))


def _kind(module: nn.Module) -> Any:
    """Return what would be set as its forward, if its code is known."""
    if isinstance(module, nn.GroupNorm):
        return forwards.GroupNorm
    block = qualified_name(forward_class(module))
    if block in _UNETS:
        return forwards.UNet if forwards.UNet.has_end(module) else None
    if block == _SEQUENTIAL and not forwards.Sequential.pairs(module):  # type: ignore[arg-type]
        return None
    return _BLOCKS.get(block)


def _found(report: Report) -> str:
    said = []
    if report.unknown:
        of_each = Counter(what for _, what in report.unknown)
        said.append("not understood: " + ", ".join(f"{count} x {what}" for what, count in of_each.items()))
    if report.left:
        said.append(f"{len(report.left)} left with a reason, which its report has")
    return "; ".join(said) or "it has no norm, activation or attention"


def accelerate(module: nn.Module, *, example: Sequence[Any] | Mapping[str, Any] | None = None) -> Report:
    """Let `module` and all in it run the kernels wherever it is recognised. A second call changes nothing.

    Call it after hooks have been registered, and before torch.compile and wrappers that set a forward. example: arguments of
    one call of the module, positional or by name; it is called with them once, without gradients and in eval mode, and the
    report's shares are of the elements that were normalised and activated and of the scores of attention, rather than
    of modules. Warns where nothing in it runs kernels.
    """
    report = Report()
    modules = list(module.named_modules())
    done = set()
    for name, part in modules:
        if _calls_group_norm(part):
            report.already.append((name, _OURS))
            done.update([part, *part.children()])  # it reads the parameters of a norm in it
    kinds = {part: _kind(part) for _, part in modules if part not in done}
    for norms in (True, False):  # blocks after their norms, which they call
        for name, part in modules:
            kind = kinds.get(part)
            if kind is not None and (kind is forwards.GroupNorm) == norms:
                _accelerate(name, part, kind, report)
    runs = {part for _, part in modules if instance_forward(part) in _KINDS} | done
    said = {name for name, _ in (*report.replaced, *report.left, *report.already)}
    report.unknown = [(n, what) for n, what in unknown_work(modules, runs) if n not in said]
    report.shares = shares_by_modules(modules, runs) if example is None else shares_by_elements(module, example)
    if not report.replaced and not report.already:
        warnings.warn(f"accelerate replaced nothing in {type(module).__name__}: {_found(report)}", stacklevel=2)
    return report


def restore(module: nn.Module) -> None:
    """Undo `accelerate` in `module` and all in it."""
    for part in module.modules():
        if instance_forward(part) in _KINDS:
            del part.forward
