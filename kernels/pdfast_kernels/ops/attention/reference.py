"""Attention in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale)
