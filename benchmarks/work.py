"""An operation on given tensors, as a user calls it: with our kernels, in plain PyTorch, and what it must move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from unittest import mock

import torch
from torch import Tensor

from benchmarks.command import Unavailable
from pdfast_kernels import dispatch, reference, use
from pdfast_kernels.adam_ema import AdamEma
from pdfast_kernels.attention import attention, attention_packed
from pdfast_kernels.ddim_step import ddim_step
from pdfast_kernels.ddim_step_weighted_loss import ddim_step_weighted_loss, ddim_step_weighted_loss_and_grad
from pdfast_kernels.diffuse import diffuse
from pdfast_kernels.group_norm import group_norm
from pdfast_kernels.group_norm_attention import group_norm_attention
from pdfast_kernels.launch import Launch, recorded

EPS = 1e-6
Size = tuple[int, int]


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


def ddim_step_work(
    samples: int,
    device: str,
    channels: int,
    size: Size,
    dtype: torch.dtype,
    parts: int,
    channels_last: bool,
    steps: int,
) -> Work:
    z = _image(samples, channels, size, dtype, device, channels_last).requires_grad_()
    output = _image(samples, parts * channels, size, dtype, device, channels_last).requires_grad_()
    index = torch.zeros(samples, dtype=torch.int64, device=device)
    inputs = z, output, _column(device, steps), _column(device, steps, parts), index
    return Work(
        kernels=lambda: ddim_step(*inputs),
        plain=lambda: reference.ddim_step(*inputs),
        reads=[z, output, index],
        differentiated=[z, output],
        reads_again=[index],
    )


def loss_work(
    samples: int, device: str, channels: int, size: Size, dtype: torch.dtype, parts: int, channels_last: bool, steps: int,
    and_grad: bool,
) -> Work:  # fmt: skip
    """With `and_grad` the function that returns the loss and its gradient at once. Without it nothing need be read
    again either: one pass over the tensors gives both."""
    z = _image(samples, channels, size, torch.float32, device, channels_last)
    output, *teacher = (_image(samples, parts * channels, size, dtype, device, channels_last) for _ in range(3))
    index = torch.zeros(samples, dtype=torch.int64, device=device)
    a, weight = (_column(device, steps) for _ in range(2))
    inputs = output, z, *teacher, a, *(_column(device, steps, parts) for _ in range(3)), weight, index
    ours, plain = ddim_step_weighted_loss, reference.ddim_step_weighted_loss
    if and_grad:
        ours = partial(ddim_step_weighted_loss_and_grad, grad_scale=1.0)
        plain = partial(reference.ddim_step_weighted_loss_and_grad, grad_scale=1.0)
    differentiated = [] if and_grad else [output.requires_grad_()]
    return Work(lambda: ours(*inputs), lambda: plain(*inputs), [output, z, *teacher, index], [], differentiated)


def adam_ema_work(samples: int, device: str, sizes: tuple[int, ...], gradient_dtype: torch.dtype) -> Work:
    """One step on parameters of these sizes; there are no samples."""
    parameters, means, squares, averages = ([torch.zeros(size, device=device) for size in sizes] for _ in range(4))
    gradients = [torch.zeros(size, dtype=gradient_dtype, device=device) for size in sizes]
    scalars = torch.tensor([1e-4, 1.0, 1.0, 1e-4, 0.0], device="cpu" if device == "meta" else device)
    states = (parameters, means, squares, averages)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = None if device == "meta" else AdamEma(*states, **settings)
    return Work(
        kernels=lambda: optimizer.step(gradients, scalars),
        plain=lambda: reference.adam_ema(*states, gradients, scalars, **settings),
        reads=[*chain(*states), *gradients],
        writes=[*chain(*states)],
    )


def group_norm_work(
    samples: int, device: str, channels: int, size: Size, dtype: torch.dtype, groups: int, film: bool, silu: bool
) -> Work:
    x = _image(samples, channels, size, dtype, device).requires_grad_()
    weight, bias = (torch.zeros(channels, device=device, requires_grad=True) for _ in range(2))
    both = torch.zeros(samples, 2 * channels, dtype=dtype, device=device)  # of one linear layer
    scale, shift = (half.requires_grad_() for half in both.chunk(2, dim=1)) if film else (None, None)
    inputs = [x, weight, bias, *([scale, shift] if film else [])]

    def call(function: Callable[..., Tensor]) -> Tensor:
        return function(x, groups, weight, bias, EPS, scale=scale, shift=shift, silu=silu)

    again = inputs if silu else [x, weight, *([scale] if film else [])]
    return Work(lambda: call(group_norm), lambda: call(reference.group_norm), inputs, [], inputs, again)


def attention_work(
    samples: int, device: str, positions: int, heads: int, head_dim: int, dtype: torch.dtype, packed: bool
) -> Work:
    shape = (samples, positions, *((3,) if packed else ()), heads, head_dim)
    inputs = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(1 if packed else 3)]
    ours, plain = (attention_packed, reference.attention_packed) if packed else (attention, reference.attention)
    return Work(lambda: ours(*inputs), lambda: plain(*inputs), inputs, [], inputs, inputs)


def group_norm_attention_work(
    samples: int, device: str, channels: int, size: Size, dtype: torch.dtype, groups: int, heads: int
) -> Work:
    x = _image(samples, channels, size, dtype, device).requires_grad_()
    shapes = ((channels,), (channels,), (3 * channels, channels), (3 * channels,), (channels, channels), (channels,))
    parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
    tensors, inputs = [x, *parameters], (x, groups, *parameters, heads)
    return Work(
        kernels=lambda: group_norm_attention(*inputs),
        plain=lambda: reference.group_norm_attention(*inputs),
        reads=tensors,
        differentiated=tensors,
        reads_again=tensors,
    )


def diffuse_work(samples: int, device: str, channels: int, size: Size, dtype: torch.dtype, flip: bool) -> Work:
    images = torch.zeros(samples, *size, channels, dtype=torch.uint8, device=device)
    phi = torch.zeros(samples, device=device)
    flips = torch.zeros(samples, dtype=torch.bool, device=device) if flip else None
    key, index = (torch.zeros(n, dtype=torch.int64, device=device) for n in (4, samples))

    def plain() -> Tensor:  # with PyTorch's own noise: eager Philox in int64 would flatter us
        noise = torch.randn(images.shape, device=device).permute(0, 3, 1, 2)
        return reference.mix(images, phi, noise, flips).to(dtype)

    return Work(
        kernels=lambda: diffuse(images, phi, key, index, flips, dtype),
        plain=plain,
        reads=[images, phi, key, index, *([flips] if flip else [])],
        same_numbers=lambda: reference.diffuse(images, phi, key, index, flips, torch.float64),
    )


def _column(device: str, *shape: int) -> Tensor:
    """Coefficients of a step table."""
    return torch.full(shape, 0.5, device=device)


def _image(
    samples: int, channels: int, size: Size, dtype: torch.dtype, device: str, channels_last: bool = True
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.zeros(samples, channels, *size, dtype=dtype, device=device).contiguous(memory_format=layout)


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
