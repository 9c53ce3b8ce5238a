"""An operation on given tensors, as a user calls it: with our kernels, in plain PyTorch, and what it must move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from benchmarks.command import Unavailable
from pdfast_kernels import dispatch, use
from pdfast_kernels.launch import Launch, recorded


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
        return self.full_name in QUICK

    @property
    def counted(self) -> int:
        """The number of samples at which its bytes are counted; 0: they are not. Few, since the interpreter takes seconds,
        but enough that weights, where there are any, are the lesser part."""
        few = {"group_norm_attention": 8, "adam_ema": 1}.get(self.op, 2)
        return few if self.full_name in (*QUICK, *COUNTED_TOO) else 0


QUICK = (
    "diffuse cifar10 128x3x32 flip fp32",
    "ddim_step cifar10 128x3x32 P=1 NHWC fp32",
    "ddim_step imagenet64 16x3x64 P=2 NHWC fp32",
    "ddim_step latents 16x8x32 P=2 NHWC bf16",
    "ddim_step_weighted_loss cifar10 128x3x32 P=1 NHWC fp32",
    "ddim_step_weighted_loss_and_grad cifar10 128x3x32 P=1 NHWC fp32",
    "group_norm cifar10 128x256x16 film+silu bf16",
    "group_norm lsun128 16x64x64 film+silu bf16",
    "group_norm small batch 1x1280x8 film+silu fp32",
    "attention cifar10 128x256x1x256 packed bf16",
    "attention imagenet64 16x64x12x64 packed bf16",
    "attention sd15 4x64x8x160 fp16",
    "attention small batch 1x64x4x64 packed fp32",
    "group_norm_attention cifar10 2x256x8 heads=1 bf16",
    "adam_ema whole vectors, fp32 gradients",
    "adam_ema any sizes, fp32 gradients",
)
COUNTED_TOO = (
    "ddim_step imagenet64 16x3x64 P=2 NCHW fp32",
    "group_norm imagenet64 16x192x64 film+silu bf16",
    "group_norm sd15 4x320x64 silu fp16",
    "attention imagenet64 16x256x9x64 packed bf16",
    "attention sd15 4x256x8x160 fp16",
    "group_norm_attention cifar10 2x256x16 heads=1 bf16",
)


@contextmanager
def kernels_wanted() -> Iterator[None]:
    """Within it, operations on CPU tensors go to their kernels: interpreted or, without the interpreter, recorded."""
    with use("triton"), mock.patch.object(dispatch, "INTERPRETED", True):
        yield


def launches(make: Callable[[], Work], arch: int) -> dict[str, list[Launch]]:
    """What the forward and the backward of the work launch, configured for sm_`arch`. Nothing is computed."""
    with kernels_wanted():
        with recorded(arch) as forward:
            work = make()
            result = work.kernels()
        if not work.differentiated:
            return {"forward": forward}
        with recorded(arch) as backward:
            work.gradients(result, torch.empty_like(result))
    return {"forward": forward, "backward": backward}


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
