"""Attention in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    return attention(*qkv.unbind(2), scale)


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
    n, c, h, w = x.shape
    positions = F.group_norm(x, num_groups, norm_weight, norm_bias, eps).permute(0, 2, 3, 1).reshape(n, h * w, c)
    qkv = F.linear(positions, qkv_weight.to(x.dtype), qkv_bias.to(x.dtype)).view(n, h * w, 3, num_heads, c // num_heads)
    attended = attention_packed(qkv).view(n, h * w, c)
    branch = F.linear(attended, proj_weight.to(x.dtype), proj_bias.to(x.dtype))
    return x + branch.view(n, h, w, c).permute(0, 3, 1, 2)
