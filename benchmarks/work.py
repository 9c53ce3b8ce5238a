"""An operation on given tensors, as a user calls it: with our kernels, in plain PyTorch, and what it must move."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import Unavailable


@dataclass(frozen=True)
class Work:
    """One call. `kernels` and `plain` compute the same from the same tensors; their results must be written."""

    kernels: Callable[[], Tensor | tuple[Tensor, ...] | None]
    plain: Callable[[], Tensor | tuple[Tensor, ...] | None]
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

    def gradients(self, result: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, self.differentiated, gradient)


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

    @property
    def quick(self) -> bool:
        """Whether it is one of the few of --quick."""
        return self.name in QUICK.get(self.op, "").split("|")


QUICK = {
    "diffuse": "cifar10 128x3x32 flip fp32",
    "ddim_step": "cifar10 128x3x32 P=1 NHWC fp32|imagenet64 16x3x64 P=2 NHWC fp32|latents 16x8x32 P=2 NHWC bf16",
    "ddim_step_weighted_loss": "cifar10 128x3x32 P=1 NHWC fp32",
    "ddim_step_weighted_loss_and_grad": "cifar10 128x3x32 P=1 NHWC fp32",
    "group_norm": "cifar10 128x256x16 film+silu bf16|lsun128 16x64x64 film+silu bf16|small batch 1x1280x8 film+silu fp32",
    "attention": "cifar10 128x256x1x256 packed bf16|imagenet64 16x64x12x64 packed bf16|sd15 4x64x8x160 fp16"
    "|small batch 1x64x4x64 packed fp32",
    "group_norm_attention": "cifar10 2x256x8 heads=1 bf16",
    "adam_ema": "whole vectors, fp32 gradients|any sizes, fp32 gradients",
}
"""Names of cases by operation."""


def fill(work: Work) -> None:
    """With numbers: zeros cost less power than what a user has. Matrices such that products are of about 1."""
    generator = torch.Generator(work.reads[0].device).manual_seed(0)
    for tensor in {id(t): t.data for t in [*work.reads, *work.differentiated]}.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if tensor.dim() == 2:
                tensor.div_(tensor.shape[1] ** 0.5)
            if work.writes:  # an optimizer's second moments are not negative
                tensor.abs_()


def in_mode(forward: Callable[[], Tensor], work: Work, mode: str) -> Callable[[], object]:
    """What is timed of a call that does the work: its forward (fwd), its backward (bwd), or both (full)."""
    if mode == "fwd":
        return torch.no_grad()(forward)
    result = forward()
    gradient = torch.ones_like(result)
    if mode == "full":
        return lambda: torch.autograd.grad(forward(), work.differentiated, gradient, allow_unused=True)
    if result.grad_fn is None:
        raise Unavailable("its result has no gradient")
    return lambda: torch.autograd.grad(result, work.differentiated, gradient, retain_graph=True, allow_unused=True)


def must_move(work: Work) -> dict[str, tuple[int, int]]:
    """Of the forward and, if there is one, the backward of work on meta tensors: the bytes that must move, and the
    floating-point operations of the matrix products.

    Each input of the operation is read once, each result written once; in the backward also the result's gradient is read,
    and those inputs that the gradients depend on.
    """
    counting = partial(FlopCounterMode, display=False)
    return {name: (bytes_of(must), counter.get_total_flops()) for name, counter, must in plain_passes(work, counting)}


def plain_passes(work: Work, counting: Callable[[], Any]) -> Iterator[tuple[str, Any, list[Tensor]]]:
    """The plain passes of work on meta tensors, each with what has counted it, and the tensors that must move."""
    with mock.patch.object(F, "scaled_dot_product_attention", _flash_attention):
        with counting() as counter:
            result = work.plain()
        yield "forward", counter, [*work.reads, *tensors_in(result), *work.writes]
        if work.differentiated:
            gradient = torch.empty_like(result)
            with counting() as counter:
                work.gradients(result, gradient)
            yield "backward", counter, [gradient, *work.reads_again, *work.differentiated]


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tensors: list[Tensor]) -> int:
    """Of the tensors as they lie in memory: what is expanded counts once."""
    sizes = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors)
    return sum(n * t.element_size() for n, t in zip(sizes, tensors, strict=True))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """What scaled_dot_product_attention is on a GPU; on meta tensors it would be taken apart."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
