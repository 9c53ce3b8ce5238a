"""The bytes an operation must move, and those that eager PyTorch moves; the operations of its matrix products.

must      each input of the operation read once, each result written once; backward, also the result's gradient and
          those inputs that the gradients depend on
eager     the inputs and outputs of each ATen operation of the plain implementation, views and allocations left out, as
          the dispatcher of a GPU would call them (attention: one flash kernel)
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work import Work

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def must_and_eager(work: Work) -> dict[str, tuple[int, int]]:
    """Bytes that must move and those that eager PyTorch moves, in the forward and, if there is one, the backward."""
    return {name: (_bytes(must), eager.bytes) for name, eager, must in _passes(work, AtenBytes)}


def flops(work: Work) -> dict[str, int]:
    """The floating-point operations of the matrix products."""
    counting = partial(FlopCounterMode, display=False)
    return {name: counter.get_total_flops() for name, counter, _ in _passes(work, counting)}


def _passes(work: Work, counting: Callable[[], Any]) -> Iterator[tuple[str, Any, list[Tensor]]]:
    """The plain passes of work on meta tensors, each with what has counted it, and the tensors that must move."""
    with mock.patch.object(F, "scaled_dot_product_attention", _flash_attention):
        with counting() as counter:
            result = work.plain()
        yield "forward", counter, [*work.reads, *_tensors(result), *work.writes]
        if work.differentiated:
            gradient = torch.empty_like(result)
            with counting() as counter:
                work.gradients(result, gradient)
            yield "backward", counter, [gradient, *work.reads_again, *work.differentiated]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of the tensors as they lie in memory: what is expanded counts once."""
    sizes = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors)
    return sum(n * t.element_size() for n, t in zip(sizes, tensors, strict=True))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """What scaled_dot_product_attention is on a GPU; on meta tensors it would be taken apart."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]


class AtenBytes(TorchDispatchMode):
    """Counts the bytes of ATen's operations within it, also of those inside our own operations on CPU tensors."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "pdfast_kernels":
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        read, written = _tensors((args, kwargs)), _tensors(result)
        if result is None:  # in place, on lists
            changed = [arg for arg, said in zip(args, func._schema.arguments, strict=False) if said.is_write]
            written = _tensors(changed)
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = func.is_view and all(t.untyped_storage()._cdata in storages for t in written)  # `to` may be one
        if not is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.bytes += _bytes([*read, *written])
        return result
