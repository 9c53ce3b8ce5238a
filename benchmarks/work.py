"""An operation on given tensors, as a user calls it: with our kernels, in plain PyTorch, what it must move, how exact it is."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.command import Unavailable


@dataclass(frozen=True)
class Work:
    """One call. `kernels` and `plain` compute the same from the same tensors; their results must be written."""

    kernels: Callable[[], Any]
    plain: Callable[[], Any]
    reads: list[Tensor]
    """What the forward must read."""
    writes: list[Tensor] = field(default_factory=list)
    """What it must write besides its results."""
    differentiated: list[Tensor] = field(default_factory=list)
    """What the backward, if there is one, must write the gradients of. It must read the result's gradient."""
    reads_again: list[Tensor] = field(default_factory=list)
    """What it must read besides."""
    same_numbers: Callable[[], Tensor] | None = None
    """What `kernels` computes, in float64, where `plain` draws other random numbers."""

    def passes(self, call: Callable[[], Any], watching: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
        """What `watching`, a context manager, has seen of the call's forward and of its backward, if there is one; its result."""
        with watching() as forward:
            result = call()
        if not self.differentiated:
            return {"forward": forward}, result
        gradient = torch.zeros_like(result)
        with watching() as backward:
            self.gradients(result, gradient)
        return {"forward": forward, "backward": backward}, result

    def gradients(self, result: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, self.differentiated, gradient, allow_unused=True)


@dataclass(frozen=True)
class Case:
    """An operation at one shape. `width`, `tensor_cores`: see benchmarks.static.gate."""

    op: str
    network: str
    """Whose shape it is; empty for nobody's: one that was named, or an optimizer's."""
    name: str
    samples: int
    make: Callable[[int, str], Work]
    """The work for a number of samples, on a device."""
    width: int
    tensor_cores: bool = False
    narrow: tuple[str, ...] = ()
    """Arguments that need no wide accesses all the same."""

    @property
    def full_name(self) -> str:
        return f"{self.op} {self.name}"

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether its full name is of one of the patterns."""
        return any(fnmatch(self.full_name, pattern) for pattern in patterns)

    @property
    def quick(self) -> bool:
        """Whether it is one of the few of --quick."""
        return self.matches(QUICK)


QUICK = (
    "diffuse cifar10 128x3x32 flip fp32|ddim_step* cifar10 128x3x32 P=1 NHWC fp32|ddim_step imagenet64 16* P=2 NHWC fp32|"
    "ddim_step latents *|group_norm cifar10 *x256x16 film* bf16|group_norm lsun128 *x64x64 film* bf16|group_norm small * 1x1280x8 * fp32|"
    "attention cifar10 *x256x1x256 *|attention imagenet64 *x64x12x64 *|attention sd15 4x64x8x160 *|attention * 1x64x4x64 * fp32|"
    "group_norm_attention cifar10 2x256x8 *|adam_ema whole vectors, fp32 *|adam_ema any sizes, fp32 *"
).split("|")
"""Patterns of the few of --quick."""


def fill(work: Work) -> None:
    """With numbers: zeros cost less power than what a user has. Matrices such that products are of about 1."""
    generator = torch.Generator(work.reads[0].device).manual_seed(0)
    for tensor in _floating(work):
        tensor.data.normal_(generator=generator)
        if tensor.dim() == 2:
            tensor.data.div_(tensor.shape[1] ** 0.5)
        if work.writes:  # an optimizer's second moments are not negative
            tensor.data.abs_()


def in_mode(forward: Callable[[], Tensor], work: Work, mode: str) -> Callable[[], object]:
    """What is timed of a call that does the work: its forward (fwd), its backward (bwd), or both (full)."""
    if mode == "fwd":
        return torch.no_grad()(forward)
    result = forward()
    gradient = torch.ones_like(result)
    if mode == "full":
        return lambda: work.gradients(forward(), gradient)
    if result.grad_fn is None:
        raise Unavailable("its result has no gradient")
    return lambda: torch.autograd.grad(result, work.differentiated, gradient, retain_graph=True, allow_unused=True)


def largest_error(call: Callable[[], Any], work: Work, mode: str) -> float:
    """How far the call's values lie from those of plain PyTorch in float64, of the same numbers: the largest difference, of the
    largest value of its tensor. Values are the results and what is written in place (mode fwd), the gradients (bwd), or both."""
    ours, tensors = _values(call, work, mode), _floating(work)
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        exact = _values(work.same_numbers or work.plain, work, mode)
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
    least = torch.finfo(torch.float32).tiny
    pairs = [(one.double(), other.double()) for one, other in zip(ours, exact, strict=True) if one is not None]
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=least)) for one, other in pairs)


def _floating(work: Work) -> list[Tensor]:
    return [*{id(t): t for t in [*work.reads, *work.differentiated] if t.is_floating_point()}.values()]


def _values(call: Callable[[], Any], work: Work, mode: str) -> list[Tensor | None]:
    """What is written in place is then as it was before."""
    before = [tensor.clone() for tensor in work.writes]
    with torch.set_grad_enabled(mode != "fwd"):
        result = call()
    values = [leaf.detach() for leaf in tensors_in(result)] + [tensor.clone() for tensor in work.writes]
    for tensor, saved in zip(work.writes, before, strict=True):
        tensor.copy_(saved)
    if mode == "fwd":
        return values
    # The same gradient for any floating-point type: bf16's numbers.
    generator = torch.Generator(result.device).manual_seed(1)
    drawn = torch.randn(result.shape, generator=generator, device=result.device).bfloat16().to(result.dtype)
    return [*(values if mode == "full" else ()), *work.gradients(result, drawn)]


def must_move(work: Work, watching: Callable[[], Any]) -> dict[str, tuple[int, Any]]:
    """Of the forward and, if there is one, the backward of work on meta tensors: the bytes that must move, and what a context
    manager has seen of plain PyTorch.

    Each input of the operation is read once, each result written once; in the backward also the result's gradient is read,
    and those inputs that the gradients depend on.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _flash_attention):
        seen, result = work.passes(work.plain, watching)
    forward = [*work.reads, *tensors_in(result), *work.writes]
    must = {"forward": forward, "backward": [*tensors_in(result), *work.reads_again, *work.differentiated]}
    return {name: (bytes_of(must[name]), of_pass) for name, of_pass in seen.items()}


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tensors: list[Tensor]) -> int:
    """Of the tensors as they lie in memory: what is expanded counts once."""
    sizes = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors)
    return sum(n * t.element_size() for n, t in zip(sizes, tensors, strict=True))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """What scaled_dot_product_attention is on a GPU; on meta tensors it would be taken apart."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
