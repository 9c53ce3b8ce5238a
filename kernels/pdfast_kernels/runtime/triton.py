"""Triton where it is installed. Elsewhere (macOS, Windows) the kernels stay plain functions that nothing calls."""

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    available = True
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=object)
    available = False

    def jit(function):
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, as here

__all__ = ["INTERPRETED", "available", "jit", "tl", "triton"]
