"""How far a call's values lie from those of plain PyTorch in float64, of the same numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.work import Work


def error(call: Callable[[], Any], work: Work, mode: str) -> float:
    """The largest difference, of the largest value of its tensor: of the results and of what is written in place (mode
    fwd), of the gradients (bwd), or of both (full)."""
    ours = _values(call, work, mode)
    with _in_float64(work):
        exact = _values(work.same_numbers or work.plain, work, mode)
    return max(_relative(one, other) for one, other in zip(ours, exact, strict=True) if one is not None)


def _values(call: Callable[[], Any], work: Work, mode: str) -> list[Tensor | None]:
    """What is written in place is then as it was before."""
    before = [tensor.clone() for tensor in work.writes]
    with torch.set_grad_enabled(mode != "fwd"):
        result = call()
    values = [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    values += [tensor.clone() for tensor in work.writes]
    for tensor, saved in zip(work.writes, before, strict=True):
        tensor.copy_(saved)
    if mode == "fwd":
        return values
    # The same gradient for any floating-point type: bf16's numbers.
    generator = torch.Generator(result.device).manual_seed(1)
    drawn = torch.randn(result.shape, generator=generator, device=result.device).bfloat16().to(result.dtype)
    gradients = torch.autograd.grad(result, work.differentiated, drawn, allow_unused=True)
    return [*gradients] if mode == "bwd" else [*values, *gradients]


@contextmanager
def _in_float64(work: Work) -> Iterator[None]:
    tensors = {id(t): t for t in [*work.reads, *work.differentiated] if t.is_floating_point()}.values()
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _relative(ours: Tensor, exact: Tensor) -> float:
    difference = (ours.double() - exact.double()).abs().max()
    return float(difference / exact.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny))
