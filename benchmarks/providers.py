"""Who else does what our kernels do: one function a provider, which makes the call to time or says why it cannot."""

import warnings
from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.command import Unavailable
from benchmarks.operations import EPS, GROUPS
from benchmarks.work import Case, Work
from pdfast_kernels.runtime import dispatch

Call = Callable[[], Any]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = ("pdfast", "eager", "compile", "apex", "liger", *SDPA)


def call_of(provider: str, case: Case, work: Work) -> Call:
    """The forward of `work` by `provider`. Unavailable with the reason, where that is known before it runs."""
    if provider in ("pdfast", "eager"):
        return work.kernels if provider == "pdfast" else work.plain
    if provider == "compile":
        if case.op == "adam_ema":
            raise Unavailable("reads its scalars on the host")
        torch._dynamo.reset()
        return torch.compile(work.plain, fullgraph=True)
    if case.op != (of := "attention" if provider in SDPA else "group_norm"):
        raise Unavailable(f"for {of} alone")
    if provider in SDPA:
        return sdpa_kernel(SDPA[provider])(work.plain)
    if "film" in case.name:
        raise Unavailable("has no FiLM")
    if work.reads[0].device.type != "cuda":
        raise Unavailable("runs on a GPU alone")
    try:
        return _apex(case, work) if provider == "apex" else _liger(case, work)
    except ImportError as error:
        raise Unavailable(f"{provider} is not installed ({error})") from None


def _apex(case: Case, work: Work) -> Call:
    from apex.contrib.group_norm import GroupNorm

    x, weight, bias = work.reads[:3]
    act = "silu" if "silu" in case.name else ""
    norm = GroupNorm(gcd(x.shape[1], GROUPS), x.shape[1], eps=EPS, act=act).cuda().to(x.dtype)
    norm.weight, norm.bias = torch.nn.Parameter(weight.to(x.dtype)), torch.nn.Parameter(bias.to(x.dtype))
    if x.shape[1] not in GroupNorm.SUPPORTED_CHANNELS:
        raise Unavailable(f"falls back to PyTorch for {x.shape[1]} channels")
    return lambda: norm(x)


def _liger(case: Case, work: Work) -> Call:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    if "silu" in case.name:
        raise Unavailable("has no SiLU")
    x, weight, bias = work.reads[:3]
    x, groups = x.detach().contiguous().requires_grad_(), gcd(x.shape[1], GROUPS)  # NCHW: what it takes
    return lambda: LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, EPS)


def fallback(call: Call) -> str | None:
    """The warning by which a call says that another implementation ran; the call is made once. Unavailable where
    PyTorch's attention has warned why it cannot run."""
    dispatch._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            if "No available kernel" not in str(error) or not caught:
                raise
            raise Unavailable(str(caught[-1].message).partition(" (Triggered")[0]) from None
    said = [str(w.message) for w in caught if "runs in PyTorch" in str(w.message) or "fall" in str(w.message).lower()]
    return said[0] if said else None
