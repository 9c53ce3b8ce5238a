"""Triton where it is installed. Elsewhere (macOS, Windows) the kernels stay plain functions that nothing calls."""

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    available = True
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=object)
    available = False


def jit(function):
    """Triton's, of a function in an operation's folder; profilers show it as OPERATION_FUNCTION, such as group_norm_apply."""
    if not available:
        return function
    name = f"{function.__module__.split('.')[-2]}_{function.__name__.strip('_')}"
    return triton.jit(repr=lambda _: name)(function)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, as here

__all__ = ["INTERPRETED", "available", "jit", "tl", "triton"]
