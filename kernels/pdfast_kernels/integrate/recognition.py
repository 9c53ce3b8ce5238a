"""How `accelerate` knows what a module computes: by whose code runs, never by a name alone."""

import ast
import builtins
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_NORM = "torch.nn.modules.normalization.GroupNorm"


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def instance_forward(module: nn.Module) -> Callable | None:
    """Return the function of the forward set on this instance; None if its class's runs."""
    if "forward" not in module.__dict__:
        return None
    forward = module.__dict__["forward"]
    function = getattr(forward, "__func__", forward)
    return None if function is type(module).forward else function


def forward_class(module: nn.Module) -> type:
    """Return the class whose forward `module` has: that of a subclass which does not override it is its base."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def is_own(cls: type, method: str = "forward") -> bool:
    """Tell whether a class's method is the one that its own file defines: not one that was put in its place later."""
    function = inspect.unwrap(vars(cls)[method])
    if not isinstance(function, FunctionType) or function.__code__.co_qualname != f"{cls.__qualname__}.{method}":
        return False
    package = cls.__module__.partition(".")[0]
    return function.__globals__.get("__name__") == cls.__module__ and all(
        str(getattr(wrapper, "__globals__", {}).get("__name__")).partition(".")[0] == package
        for wrapper in wrappers(vars(cls)[method])
    )


def wrappers(function: Any) -> Iterator[Any]:
    """Yield the decorated functions around the one that `inspect.unwrap` gives."""
    while hasattr(function, "__wrapped__"):
        yield function
        function = function.__wrapped__


def code_names(function: Callable) -> tuple[str, ...]:
    """Return the names of globals and attributes in a function, in the order of their first use."""
    function = inspect.unwrap(function)
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def unknown_version(cls: type, method: str, known: str) -> str | None:
    """Return why a method is not the one that was looked at: its name and those that it uses are compared."""
    if not is_own(cls, method):
        return f"{cls.__name__}.{method} was replaced by somebody else's"
    unknown = [name for name in code_names(vars(cls)[method]) if name not in known.split()]
    where = f"{cls.__qualname__}.{method}"
    return f"{where} is of an unknown version: it uses {', '.join(unknown)}" if unknown else None


def why_not_group_norm(norm: nn.GroupNorm) -> str | None:
    """Return why a GroupNorm is not known to compute what `group_norm` does; None for torch's own, and for those that only
    cast."""
    cls = forward_class(norm)
    if qualified_name(cls) == GROUP_NORM:
        return None if is_own(cls) else "GroupNorm.forward was replaced by somebody else's"
    own = f"{type(norm).__name__} has a forward of its own"
    following = type(norm).__mro__[type(norm).__mro__.index(cls) + 1 :]
    base = next(cls for cls in following if "forward" in vars(cls))
    if qualified_name(base) != GROUP_NORM or not is_own(base) or not _only_casts(cls):
        return own
    return None if _keeps_the_contract(cls, norm) else f"{own}, which returns another dtype or other values"


# A forward of nothing but these is a GroupNorm of its own parameters between casts.
_NODES = (
    *(ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.Expr, ast.Call, ast.keyword, ast.Attribute),
    *(ast.Name, ast.Load, ast.Store, ast.IfExp, ast.Compare, ast.Is, ast.IsNot, ast.Constant),
)
_ATTRIBUTES = set(
    """forward float float32 type to dtype type_as num_groups weight bias eps group_norm functional nn GroupNorm""".split()
)


def _only_casts(cls: type) -> bool:
    function = vars(cls)["forward"]
    if not isinstance(function, FunctionType) or function.__defaults__ or function.__kwdefaults__:
        return False
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return False  # written where there is no file, in a notebook's string, say
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or len(tree.args.args) != 2:
        return False
    tree.returns = None
    for argument in tree.args.args:
        argument.annotation = None
    known: list[Any] = [torch, nn, F, builtins.super, *cls.__mro__]
    local = set(function.__code__.co_varnames)
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=value):
                allowed = value is None or isinstance(value, str)  # a docstring
            case ast.Attribute(attr=attribute):
                allowed = attribute in _ATTRIBUTES
            case ast.Name(id=name):
                value = function.__globals__.get(name, getattr(builtins, name, None))
                allowed = name in local or any(value is one for one in known)
            case _:
                allowed = isinstance(node, _NODES)
        if not allowed:
            return False
    return True


def _keeps_the_contract(cls: Any, norm: nn.GroupNorm) -> bool:
    """Tell whether its class's forward, on small tensors, gives a GroupNorm in float32 in the dtype of its input."""
    generator = torch.Generator().manual_seed(0)
    channels = norm.num_channels
    x = torch.randn(2, channels, 3, generator=generator, device="cpu") * 2 + 1
    weight, bias = torch.randn(2, channels, generator=generator, device="cpu") if norm.affine else (None, None)
    exact = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    if set(norm._parameters) != {"weight", "bias"}:
        return False
    copied = copy.copy(norm)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for parameters in {torch.float32, dtype}:
            values = [None if p is None else nn.Parameter(p.to(parameters)) for p in (weight, bias)]
            copied.__dict__["_parameters"] = dict(zip(("weight", "bias"), values, strict=True))
            y = _tried(cls, copied, x.to(dtype))
            if y is None and parameters != torch.float32:
                continue  # it refuses what the kernels take
            tolerance = 1e-5 if dtype == torch.float32 else 0.1
            if y is None or y.dtype != dtype or not torch.allclose(y.float(), exact, atol=tolerance, rtol=tolerance):
                return False
    return True


@torch.no_grad()
def _tried(cls: Any, norm: nn.Module, x: Tensor) -> Tensor | None:
    try:
        return cls.forward(norm, x)
    except RuntimeError:
        return None
