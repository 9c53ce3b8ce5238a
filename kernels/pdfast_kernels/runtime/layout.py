"""Where the elements of images and of network outputs lie in memory."""

import torch
from torch import Tensor


def in_vmap() -> bool:
    """Tell whether tensors are slices that `torch.func.vmap` takes of larger ones, whose layout it does not tell."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack()  # private, but nothing public says it
    return levels is not None and any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def is_channels_last(tensor: Tensor) -> bool:
    """Tell whether [N, C, H, W] lies dense as [N, H, W, C]; no under vmap."""
    return tensor.dim() == 4 and not in_vmap() and tensor.is_contiguous(memory_format=torch.channels_last)


def with_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    """Return the tensor itself if it lies so, else a copy: gradients arrive with any strides, 0 included."""
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def in_one_layout(z: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return z [N, C, ...] and others [N, P*C, ...] as `run_length` takes them: copies of those that do not lie like z, where
    z lies dense; else all contiguous."""
    if run_length(z, *others)[1] is None:
        return z, *others
    channels_last = is_channels_last(z)
    return tuple(with_layout(tensor, channels_last) for tensor in (z, *others))


def run_length(z: Tensor, *others: Tensor) -> tuple[int, str | None]:
    """Return how many elements of a sample of z [N, C, ...] lie together before the same place of an output [N, P*C, ...] has
    its next part: C when all are channels-last, C*H*W when all are contiguous; else 0 and the reason.

    Element e of a sample is then, in part p of an output, number (e // run) * P * run + p * run + e % run.
    """
    if is_channels_last(z) and all(is_channels_last(t) for t in others):
        return z.shape[1], None
    if z.is_contiguous() and all(t.is_contiguous() for t in others):
        return z[0].numel() if len(z) else 1, None
    return 0, "z and the outputs are neither all channels-last nor all contiguous"
