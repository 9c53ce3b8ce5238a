"""3x3 convolutions from or to a few channels as matrix products, for a GPU in float32.

    y[h, w] = bias + sum over ij of weight[:, i, j] x[h + i - 1, w + j - 1]        x zero outside of the image

cuDNN has no fast kernel without TF32 for the three channels of an image: its convolutions take 4 to 13 % of a copy's rate (an H200,
docs/results.md). Here the nine pixels around each are gathered, or the nine parts of each are added up, on the side that has
few channels, and the rest is one product of matrices. Images are [N, C, H, W] with channels-last strides, weights [out, 3, 3, in].
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

FEW = 8
"""Channels at most; with more, an implicit product without the nine parts is faster."""
_ALIGNED = 4  # float32 values in 16 bytes, which is how wide the products load


def wanted(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `convolution` is the faster one, without a product that TF32 would round."""
    if x.device.type != "cuda" or x.dtype != torch.float32 or weight.shape[1:3] != (3, 3):
        return False
    # In a network that is compiled as one graph: Dynamo takes no function with a derivative in forward mode.
    if torch.compiler.is_compiling():
        return False
    # The gradient of what is gathered would be added up by atomics.
    return len(weight) <= FEW or (x.shape[1] <= FEW and not x.requires_grad)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the same-padded convolution of x [N, in, H, W] with weight [out, 3, 3, in], whichever of in and out is small."""
    pixels = x.permute(0, 2, 3, 1)
    if len(weight) > FEW:
        return F.linear(_neighbours(pixels), _wide(weight.flatten(1)), bias).permute(0, 3, 1, 2)
    return (_ToFew.apply(pixels, weight) + bias).permute(0, 3, 1, 2)


class _ToFew(Function):
    """Of x [N, H, W, in] and weight [out, 3, 3, in], [N, H, W, out]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        out = len(weight)
        parts = F.pad(F.linear(x, _rows(weight)), (0, 0, 1, 1, 1, 1))
        n, height, width, _ = parts.shape
        of_n, of_h, of_w, _ = parts.stride()
        # The part of tap (i, j) is added where that tap sees its pixel.
        size = (n, height - 2, width - 2, out, 3, 3)
        return parts.as_strided(size, (of_n, of_h, of_w, 1, of_h + 3 * out, of_w + out)).sum((4, 5))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, x_tangent: Tensor | None, weight_tangent: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = [] if x_tangent is None else [_ToFew.forward(x_tangent, weight)]
        terms += [] if weight_tangent is None else [_ToFew.forward(x, weight_tangent)]
        return sum(terms[1:], terms[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        neighbours = _neighbours(grad.contiguous()).flatten(0, 2)  # through tap (i, j) goes what lies at the tap across
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (neighbours @ _rows(weight.flip(1, 2))).view_as(x)
        if ctx.needs_input_grad[1]:
            taps = (neighbours.T @ x.reshape(-1, x.shape[3]))[: weight[..., 0].numel()]
            grad_weight = taps.view(3, 3, len(weight), -1).flip(0, 1).permute(2, 0, 1, 3)
        return grad_x, grad_weight


def _neighbours(pixels: Tensor) -> Tensor:
    """Return the nine pixels around each of [N, H, W, C], one after another and zeros to a whole number of loads: [N, H, W, >= 9 C]."""
    n, height, width, channels = pixels.shape
    padded = F.pad(pixels, (0, 0, 1, 1, 1, 1))
    of_n, of_h, of_w, of_c = padded.stride()
    size = (n, height, width, 3, 3, channels)
    return _wide(padded.as_strided(size, (of_n, of_h, of_w, of_h, of_w, of_c)).flatten(3))


def _rows(weight: Tensor) -> Tensor:
    """Return [out, 3, 3, in] as a row for each tap and each output, and rows of zeros: [>= 9 out, in]."""
    rows = weight.permute(1, 2, 0, 3).flatten(0, 2)
    return F.pad(rows, (0, 0, 0, -len(rows) % _ALIGNED))


def _wide(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, -rows.shape[-1] % _ALIGNED))
