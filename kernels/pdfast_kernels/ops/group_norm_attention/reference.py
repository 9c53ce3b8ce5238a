"""An attention block in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

import torch.nn.functional as F
from torch import Tensor

from pdfast_kernels.ops.attention.reference import attention_packed
from pdfast_kernels.ops.group_norm.reference import normalise


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
    normalised = normalise(x, num_groups, norm_weight, norm_bias, eps)
    positions = normalised.permute(0, 2, 3, 1).reshape(n, h * w, c)
    qkv = F.linear(positions, qkv_weight.to(x.dtype), qkv_bias.to(x.dtype)).view(n, h * w, 3, num_heads, c // num_heads)
    attended = attention_packed(qkv).view(n, h * w, c)
    branch = F.linear(attended, proj_weight.to(x.dtype), proj_bias.to(x.dtype))
    return x + branch.view(n, h, w, c).permute(0, 3, 1, 2)
