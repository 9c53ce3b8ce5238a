"""Which implementation of an operation runs, its Triton kernels or the plain PyTorch of `reference.py`; and what both take.

`PDFAST_KERNELS`, or `use(mode)`, says which:

    auto       (the default) Triton on a GPU, PyTorch elsewhere; a case the kernels do not support runs in PyTorch, after
               one warning that names the reason
    triton     Triton, also on CPU tensors where TRITON_INTERPRET=1 was set before the first import; a case that is not
               supported is a ValueError
    reference  PyTorch

Whichever runs, the dtypes are the same. What an operation computes with is bf16, fp16, fp32 or fp64, each tensor of its own
(the parts of attention of one); the result has the dtype of the first, the image or state, and a gradient that of what it is
of. Inside it is float32 (in PyTorch fp64 too). autocast changes nothing: the tensors are taken as they are given.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import local
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pdfast_kernels.runtime.layout import in_vmap
from pdfast_kernels.runtime.triton import INTERPRETED, available

Mode = Literal["auto", "triton", "reference"]
MODES = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
EXPECTED_DTYPE = "expected a floating-point type of 16, 32 or 64 bits"
OLDEST_CAPABILITY = (8, 0)

_warned: set[str] = set()

_default = os.environ.get("PDFAST_KERNELS", "auto")
if _default not in MODES:
    raise ValueError(f"PDFAST_KERNELS is {_default!r}: say one of {', '.join(MODES)}")
_mode: ContextVar[str] = ContextVar("pdfast_kernels.mode", default=_default)
# The mode of this thread's context for torch.compile, which guards what it reads of a thread but cannot read context variables.
_traced = local()


def constant_when_compiled(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which imports the whole compiler (a second) to set this one attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Within it, PDFAST_KERNELS is `mode`, for the calls of this thread (or asyncio task) and their gradients, in whichever
    thread those are computed. ValueError for an unknown one."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: say one of {', '.join(MODES)}")
    token, _traced.mode = _mode.set(mode), mode
    try:
        yield
    finally:
        _mode.reset(token)
        _traced.mode = _mode.get()


def _current_mode() -> str:
    return getattr(_traced, "mode", _default) if torch.compiler.is_compiling() else _mode.get()


def as_given(device: torch.device) -> AbstractContextManager:
    """Within it, PyTorch computes in the dtypes of its tensors, also under autocast, as the kernels do."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return what is computed in: float64 if one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def triton_runs(op: str, device: torch.device, unsupported: str | None) -> bool:
    """Tell whether `op` runs in Triton for tensors on `device`; `unsupported` is why its kernels cannot take them, or None."""
    mode = _current_mode()
    if mode == "reference" or device.type == "meta" or (mode == "auto" and device.type != "cuda"):
        return False
    reason = _unavailable(device) or ("its kernels do not run under torch.func.vmap" if in_vmap() else unsupported)
    if forward_ad._current_level >= 0:  # private, but a custom operation would drop the tangents in silence
        reason = reason or "its kernels have no forward-mode derivative"
    if reason is None:
        return True
    if mode == "triton":
        raise ValueError(f"{op}: {reason} (PDFAST_KERNELS=triton; `auto` would run it in PyTorch)")
    _warn_once(f"pdfast_kernels.{op} runs in PyTorch: {reason}")
    return False


@constant_when_compiled
def _unavailable(device: torch.device) -> str | None:
    if not available:
        return "Triton is not installed"
    if device.type == "cpu":
        return None if INTERPRETED else "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"there are no kernels for {device.type} devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
    return None


@constant_when_compiled
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def unsupported_dtype(**tensors: Tensor | None) -> str | None:
    """Return the reason not to run, if one of them is neither bf16, fp16 nor fp32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
    return None


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless `tensor` has that shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise a ValueError unless all of them are on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the others are on {device}")


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError unless all of them are of one of DTYPES."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, {EXPECTED_DTYPE}")
