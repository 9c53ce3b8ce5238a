"""Conditions: what a model is given besides z and phi, a tree of tensors with the batch first.

A tree is a tensor, None, or a dict, list or tuple of trees; anything else in it is handed on as it is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def map_condition(function: Callable[[Tensor], Tensor], cond: Any) -> Any:
    """Return the tree with each tensor replaced by what the function makes of it."""
    if isinstance(cond, Tensor):
        return function(cond)
    if isinstance(cond, dict):
        return {name: map_condition(function, part) for name, part in cond.items()}
    if isinstance(cond, tuple) and hasattr(cond, "_fields"):  # a NamedTuple
        return type(cond)(*(map_condition(function, part) for part in cond))
    if isinstance(cond, list | tuple):
        return type(cond)(map_condition(function, part) for part in cond)
    return cond


def join_conditions(first: Any, second: Any) -> Any:
    """Return the tree with the tensors of two trees of one structure joined along the batch."""
    others = tensors_of(second)
    return map_condition(lambda tensor: torch.cat([tensor, next(others)]), first)


def tensors_of(cond: Any) -> Iterator[Tensor]:
    """Yield the tensors of the tree, in its order."""
    if isinstance(cond, Tensor):
        yield cond
    elif isinstance(cond, dict | list | tuple):
        for part in cond.values() if isinstance(cond, dict) else cond:
            yield from tensors_of(part)


def check_cond(cond: Any, count: int) -> None:
    """Raise a ValueError for a tensor of conditions that are not as many as the samples."""
    for tensor in tensors_of(cond):
        if tensor.shape[:1] != (count,):
            raise ValueError(
                f"cond has shape {tuple(tensor.shape)}: there are {count} samples, and it begins with as many"
            )
