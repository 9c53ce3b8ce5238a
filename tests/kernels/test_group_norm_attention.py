"""`group_norm_attention` in Triton's interpreter against the block written out in float64."""

import pytest
import torch

from pdfast.networks.layers import Attention
from pdfast_kernels import use
from pdfast_kernels.ops.group_norm_attention.group_norm_attention import group_norm_attention
from pdfast_kernels.reference import group_norm_attention as reference
from tests.kernels.compare import RELATIVE, assert_relative, channels_last

# N, C, H, W, groups, heads, dtype: 16 positions and 35, 17 and 100; head_dim 16, 24, 40 and 32
CASES = [
    (2, 32, 4, 4, 8, 2, torch.float32),
    (2, 48, 5, 7, 4, 2, torch.float32),
    (1, 40, 17, 1, 1, 1, torch.float32),
    (2, 32, 10, 10, 32, 1, torch.float32),
    (2, 64, 8, 8, 32, 2, torch.float16),
]
RELATIVE_HALF = 8 * RELATIVE[torch.float16]  # what lies between is rounded to fp16 as well: normalised x, qkv, attended
NAMES = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")


def block(draw, n, c, h, w, dtype=torch.float32):
    """x, and parameters of the size that trained ones have."""
    x = (2 * channels_last(draw(n, c, h, w)) + 1).to(dtype)
    parameters = (1 + draw(c) / 4, draw(c), draw(3 * c, c) / c**0.5, draw(3 * c), draw(c, c) / c**0.5, draw(c))
    return [tensor.requires_grad_() for tensor in (x, *(parameter.to(dtype) for parameter in parameters))]


def expected_block(x, groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, eps=1e-6):
    n, c, h, w = x.shape
    grouped = x.double().reshape(n, groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    xhat = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(n, c, h * w)
    normalised = torch.einsum("ncl,c->nlc", xhat, norm_weight.double()) + norm_bias.double()
    qkv = torch.einsum("nlc,oc->nlo", normalised, qkv_weight.double()) + qkv_bias.double()
    q, k, v = qkv.reshape(n, h * w, 3, heads, c // heads).unbind(2)
    weight = torch.softmax(torch.einsum("nlhd,nmhd->nhlm", q, k) * (c // heads) ** -0.5, dim=3)
    attended = torch.einsum("nhlm,nmhd->nlhd", weight, v).reshape(n, h * w, c)
    branch = torch.einsum("nlc,oc->nol", attended, proj_weight.double()) + proj_bias.double()[:, None]
    return x.double() + branch.reshape(n, c, h, w)


@pytest.mark.parametrize(("n", "c", "h", "w", "groups", "heads", "dtype"), CASES)
def test_values_and_gradients(triton_kernels, draw, n, c, h, w, groups, heads, dtype):
    x, *parameters = tensors = block(draw, n, c, h, w, dtype)
    y = group_norm_attention(x, groups, *parameters, heads)
    expected = expected_block(x, groups, *parameters, heads)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    relative = RELATIVE_HALF if dtype == torch.float16 else RELATIVE[dtype]
    assert_relative(y, expected, relative)
    gradient = draw(n, c, h, w).to(dtype)
    theirs = torch.autograd.grad(expected, tensors, gradient.double())
    for one, other, like in zip(torch.autograd.grad(y, tensors, gradient), theirs, tensors, strict=True):
        assert one.dtype == like.dtype and one.stride() == like.stride()
        assert_relative(one, other, relative)


def test_it_replaces_the_block_of_the_network(triton_kernels, draw):
    module = Attention(32, head_dim=16, num_groups=8).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(module.proj.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    x, gradient = channels_last(draw(2, 32, 4, 4)).requires_grad_(), draw(2, 32, 4, 4)
    tensors = (x, *module.parameters())
    y = group_norm_attention(x, 8, *module.parameters(), 2)
    ours, theirs = torch.autograd.grad(y, tensors, gradient), torch.autograd.grad(module(x), tensors, gradient)
    for one, other in zip((y, *ours), (module(x), *theirs), strict=True):
        assert_relative(one, other)


def test_parameters_of_another_dtype(triton_kernels, draw):
    x, *parameters = tensors = block(draw, 2, 32, 4, 4)
    half = x.detach().half().requires_grad_()
    y, expected = group_norm_attention(half, 8, *parameters, 2), expected_block(half, 8, *parameters, 2)
    assert y.dtype == torch.float16
    assert_relative(y, expected, RELATIVE_HALF)
    gradient = draw(2, 32, 4, 4, dtype=torch.float16)
    theirs = torch.autograd.grad(expected, (half, *parameters), gradient.double())
    for one, other, like in zip(torch.autograd.grad(y, (half, *parameters), gradient), theirs, tensors, strict=True):
        assert one.dtype == (torch.float16 if like is x else torch.float32)
        assert_relative(one, other, RELATIVE_HALF)


def test_a_gradient_of_stride_zero_and_frozen_parameters(triton_kernels, draw):
    x, *parameters = block(draw, 2, 32, 4, 4)
    frozen = [parameter.detach() for parameter in parameters]
    (ours,) = torch.autograd.grad(group_norm_attention(x, 8, *frozen, 2).sum(), x)
    assert_relative(ours, torch.autograd.grad(expected_block(x, 8, *frozen, 2).sum(), x)[0])
    ours = torch.autograd.grad(group_norm_attention(x.detach(), 8, *parameters, 2).sum(), parameters)
    theirs = torch.autograd.grad(expected_block(x.detach(), 8, *parameters, 2).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert_relative(one, other)


def test_the_same_bits_in_every_run(triton_kernels, draw):
    x, *parameters = tensors = block(draw, 2, 32, 6, 6)
    runs = []
    for _ in range(2):
        y = group_norm_attention(x, 8, *parameters, 2)
        runs.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_no_samples_and_no_gradient(triton_kernels, draw):
    x, *parameters = block(draw, 0, 32, 4, 4)
    assert group_norm_attention(x, 8, *parameters, 2).shape == (0, 32, 4, 4)
    x, *parameters = block(draw, 1, 32, 4, 4)
    with torch.no_grad():
        assert not group_norm_attention(x, 8, *parameters, 2).requires_grad


def test_opcheck(triton_kernels, draw):
    x, *parameters = block(draw, 2, 16, 3, 5)
    torch.library.opcheck(torch.ops.pdfast_kernels.group_norm_attention.default, (x, 4, *parameters, 1, 1e-6))


def test_compiled_without_a_graph_break(triton_kernels, draw):
    x, *parameters = tensors = block(draw, 2, 16, 4, 4)
    compiled = torch.compile(group_norm_attention, fullgraph=True, backend="aot_eager")
    runs = []
    for function in (group_norm_attention, compiled):
        y = function(x, 4, *parameters, 1)
        runs.append((y, *torch.autograd.grad(y, tensors, torch.ones_like(y))))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_what_does_not_fit_is_named(draw):
    x, *parameters = block(draw, 2, 16, 4, 4)
    for arguments, message in [
        ((x[0], 4, *parameters, 1), r"x has shape \(16, 4, 4\), expected \[N, C, H, W\]"),
        ((x, 3, *parameters, 1), r"16 channels of x \(2, 16, 4, 4\) do not divide into num_groups = 3"),
        ((x, 4, *parameters, 5), r"16 channels of x \(2, 16, 4, 4\) do not divide into num_heads = 5"),
        ((x.int(), 4, *parameters, 1), "x is torch.int32, expected a floating-point type"),
        ((x, 4, *(p.to("meta") for p in parameters), 1), "norm_weight is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"group_norm_attention: {message}"):
            group_norm_attention(*arguments)
    for i, name in enumerate(NAMES):
        wrong = [p[:-1] if j == i else p for j, p in enumerate(parameters)]
        shapes = f"{tuple(wrong[i].shape)}, expected {tuple(parameters[i].shape)}"
        with pytest.raises(ValueError) as error:
            group_norm_attention(x, 4, *wrong, 1)
        assert str(error.value) == f"group_norm_attention: {name} has shape {shapes}"


def test_unsupported_cases_are_refused_by_the_kernels_and_run_in_pytorch(draw):
    x, *parameters = block(draw, 2, 12, 4, 4)
    wide = block(draw, 1, 136, 2, 2)
    for (image, *others), heads, message in [
        ((x.contiguous(), *parameters), 1, "not those of a channels-last tensor"),
        ((x.double(), *parameters), 1, "x is torch.float64"),
        ((x, *parameters), 1, "head_dim 12, not a multiple of 8 up to 128"),
        (wide, 1, "head_dim 136, not a multiple of 8 up to 128"),
    ]:
        if image.dtype == torch.float64:
            others = [other.double() for other in others]
        with use("triton"), pytest.raises(ValueError, match=message):
            group_norm_attention(image, 4, *others, heads)
        assert_relative(group_norm_attention(image, 4, *others, heads), expected_block(image, 4, *others, heads))


def test_the_reference(draw):
    tensors = [t.detach().double().requires_grad_() for t in block(draw, 2, 4, 2, 3)]
    x, *parameters = tensors
    assert_relative(reference(x, 2, *parameters, 2), expected_block(x, 2, *parameters, 2), 1e-12)
    torch.autograd.gradcheck(lambda x, *parameters: reference(x, 2, *parameters, 2), tensors)
