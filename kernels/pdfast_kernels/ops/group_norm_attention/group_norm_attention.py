"""`group_norm_attention`: the attention block of a U-Net as one operation.

    y = x + proj(attention(qkv(group_norm(x))))

x                           [N, C, H, W] bf16, fp16 or fp32, channels-last; C = heads * head_dim
norm_weight, norm_bias      [C]
qkv_weight, qkv_bias        [3C, C], [3C]: rows in the order (3, heads, head_dim)
proj_weight, proj_bias      [C, C], [C]
y                           like x;  the gradients like what they are of, for all tensors

Parameters may be of another dtype than x: the matrix products are of x's dtype. They are cuBLAS's; `group_norm` and
`attention` say what theirs do. Positions stay [N H W, C] throughout, so nothing is copied or permuted. Saved for the
backward: x, the parameters, qkv, attended [N, H W, heads, head_dim], and small statistics; the normalised x is computed
again. Other layouts, dtypes and head sizes run in PyTorch.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pdfast_kernels.ops.attention.attention import backward as attention_backward
from pdfast_kernels.ops.attention.attention import forward as attention_forward
from pdfast_kernels.ops.attention.attention import unsupported_dim
from pdfast_kernels.ops.group_norm.group_norm import backward as group_norm_backward
from pdfast_kernels.ops.group_norm.group_norm import forward as group_norm_forward
from pdfast_kernels.ops.group_norm_attention import reference
from pdfast_kernels.runtime.dispatch import (
    as_given,
    check_device,
    check_floating,
    check_shape,
    triton_runs,
    unsupported_dtype,
)
from pdfast_kernels.runtime.layout import is_channels_last, with_layout
from pdfast_kernels.runtime.namespace import in_namespace


def _as_given(function: Callable) -> Callable:
    """Compute the matrix products in the dtypes of the tensors, whatever autocast says where it is called."""

    @wraps(function)
    def as_it_is(x: Tensor, *arguments: Any) -> Any:
        with as_given(x.device):
            return function(x, *arguments)

    return as_it_is


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W], channels-last -> [N H W, C], a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias.to(rows.dtype), rows, weight.to(rows.dtype).t())


@torch.library.custom_op(in_namespace("group_norm_attention"), mutates_args=())
@_as_given
def _group_norm_attention(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    dim = c // num_heads
    normalised, mean, rstd = group_norm_forward(x, num_groups, norm_weight, norm_bias, None, None, eps, False)
    qkv = _linear(_rows(normalised), qkv_weight, qkv_bias).view(n, h * w, 3, num_heads, dim)
    q, k, v = qkv.unbind(2)
    attended, lse = attention_forward(q, k, v, dim**-0.5)
    y = _linear(attended.view(-1, c), proj_weight, proj_bias).add_(_rows(x))
    return _image(y, x), mean, rstd, qkv, lse, attended


@_group_norm_attention.register_fake
def _(x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps):
    n, c, h, w = x.shape
    statistic = x.new_empty((n, num_groups), dtype=torch.float32)
    qkv = x.new_empty((n, h * w, 3, num_heads, c // num_heads))
    lse = x.new_empty((n, num_heads, h * w), dtype=torch.float32)
    attended = x.new_empty((n, h * w, num_heads, c // num_heads))
    return _image(x.new_empty(n * h * w, c), x), statistic, torch.empty_like(statistic), qkv, lse, attended


@torch.library.custom_op(in_namespace("group_norm_attention_backward"), mutates_args=())
@_as_given
def _group_norm_attention_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    qkv: Tensor,
    lse: Tensor,
    attended: Tensor,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the six parameters."""
    c = x.shape[1]
    dy = with_layout(dy, True)
    dy_rows = _rows(dy)
    d_proj_weight = (dy_rows.t() @ attended.view(-1, c)).to(proj_weight.dtype)
    d_proj_bias = dy_rows.sum(0, dtype=torch.float32).to(proj_bias.dtype)
    d_attended = (dy_rows @ proj_weight.to(x.dtype)).view(attended.shape)

    d_qkv = torch.empty_like(qkv)
    q, k, v = qkv.unbind(2)
    scale = attended.shape[3] ** -0.5
    attention_backward(d_attended, q, k, v, attended, lse, scale, d_qkv.unbind(2))
    d_qkv_rows = d_qkv.view(-1, 3 * c)
    normalised, _, _ = group_norm_forward(x, num_groups, norm_weight, norm_bias, None, None, eps, False)
    d_qkv_weight = (d_qkv_rows.t() @ _rows(normalised)).to(qkv_weight.dtype)
    d_qkv_bias = d_qkv_rows.sum(0, dtype=torch.float32).to(qkv_bias.dtype)
    d_normalised = _image(d_qkv_rows @ qkv_weight.to(x.dtype), x)

    dx, (d_norm_weight, d_norm_bias, _, _) = group_norm_backward(
        d_normalised, x, mean, rstd, num_groups, norm_weight, norm_bias, None, None, False
    )
    assert d_norm_weight is not None and d_norm_bias is not None  # both parameters are there
    dx += dy
    return dx, d_norm_weight, d_norm_bias, d_qkv_weight, d_qkv_bias, d_proj_weight, d_proj_bias


@_group_norm_attention_backward.register_fake
def _(dy, x, *rest):
    return torch.empty_like(x), *(parameter.new_empty(parameter.shape) for parameter in rest[:6])


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, *parameters, _, ctx.eps = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(x, *parameters, *saved)


def _autograd(ctx, dy, *_):
    dx, *gradients = _group_norm_attention_backward(dy, *ctx.saved_tensors, ctx.num_groups, ctx.eps)
    return dx, None, *gradients, None, None


_group_norm_attention.register_autograd(_autograd, setup_context=_setup_context)


def group_norm_attention(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """x + proj(attention(qkv(group_norm(x)))) of x [N, C, H, W], over its H*W positions; like x.

    norm_weight, norm_bias, proj_bias: [C]. qkv_weight: [3C, C], rows in the order (3, heads, C / heads); qkv_bias:
    [3C]. proj_weight: [C, C]. See the module for layouts and dtypes. ValueError where a shape, dtype or device does not
    fit.
    """
    op = "group_norm_attention"
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    c = x.shape[1]
    for name, parts in (("num_groups", num_groups), ("num_heads", num_heads)):
        if parts < 1 or c % parts:
            raise ValueError(f"{op}: {c} channels of x {tuple(x.shape)} do not divide into {name} = {parts}")
    parameters = {
        "norm_weight": (norm_weight, (c,)),
        "norm_bias": (norm_bias, (c,)),
        "qkv_weight": (qkv_weight, (3 * c, c)),
        "qkv_bias": (qkv_bias, (3 * c,)),
        "proj_weight": (proj_weight, (c, c)),
        "proj_bias": (proj_bias, (c,)),
    }
    for name, (parameter, shape) in parameters.items():
        check_shape(op, name, parameter, shape)
    tensors = {name: parameter for name, (parameter, _) in parameters.items()}
    check_floating(op, x=x, **tensors)
    check_device(op, x.device, **tensors)
    unsupported = unsupported_dtype(x=x, **tensors) or _unsupported(x, c // num_heads, norm_weight, norm_bias)
    if x.numel() and triton_runs(op, x.device, unsupported):
        return _group_norm_attention(x, num_groups, *tensors.values(), num_heads, eps)[0]
    with as_given(x.device):
        return reference.group_norm_attention(x, num_groups, **tensors, num_heads=num_heads, eps=eps)


def _unsupported(x: Tensor, dim: int, norm_weight: Tensor, norm_bias: Tensor) -> str | None:
    if not is_channels_last(x):
        return f"x has strides {tuple(x.stride())}, not those of a channels-last tensor"
    if norm_weight.stride(0) != 1 or norm_bias.stride(0) != 1:
        return "norm_weight and norm_bias have strides, not 1"
    if reason := unsupported_dim(dim, x.dtype):
        return f"x {tuple(x.shape)} has {reason}"
    return None
