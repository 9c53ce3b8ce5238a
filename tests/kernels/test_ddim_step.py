"""`ddim_step` in Triton's interpreter against einsum in float64."""

import math

import pytest
import torch

from pdfast_kernels import ddim_step, use
from tests.kernels.compare import RELATIVE, assert_relative, channels_last

SHAPES = [(3, 3, 8, 8), (2, 8, 4, 4), (1, 1, 5, 7), (2, 3, 40, 40), (5, 7), (2, 4, 6), (0, 3, 8, 8), (3, 16, 40, 40)]


def expected_step(z, output, a, b, index):
    n, c, parts = z.shape[0], z.shape[1], b.shape[1]
    rows = torch.arange(n) if index is None else index
    o = output.double().reshape(n, parts, c, math.prod(z.shape[2:]))
    step = torch.einsum("n,nce->nce", a.double()[rows], z.double().reshape(n, c, math.prod(z.shape[2:])))
    return (step + torch.einsum("np,npce->nce", b.double()[rows], o)).reshape(z.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(triton_kernels, draw, shape, parts, layout):
    if layout is torch.channels_last and len(shape) != 4:
        pytest.skip("only images have channels-last strides")
    n, c, *rest = shape
    z = draw(*shape).contiguous(memory_format=layout).requires_grad_()
    output = draw(n, parts * c, *rest).contiguous(memory_format=layout).requires_grad_()
    index = torch.tensor([4, 0, 3, 3, 1])[:n]
    a, b = draw(5), draw(5, parts)

    step = ddim_step(z, output, a, b, index)
    assert step.dtype == z.dtype and step.is_contiguous(memory_format=layout)
    assert_relative(step, expected_step(z, output, a, b, index))

    gradient = draw(*shape)
    ours = torch.autograd.grad(step, (z, output), gradient)
    theirs = torch.autograd.grad(expected_step(z, output, a, b, index), (z, output), gradient.double())
    for one, other, like in zip(ours, theirs, (z, output), strict=True):
        assert one.shape == like.shape and one.is_contiguous(memory_format=layout)
        assert_relative(one, other)


def test_a_row_for_each_sample_and_other_dtypes(triton_kernels, draw):
    z, output = channels_last(draw(3, 3, 8, 8)), channels_last(draw(3, 3, 8, 8, dtype=torch.float16))
    a, b = draw(3), draw(3, 1)
    step = ddim_step(z, output, a, b)
    assert step.dtype == torch.float32
    assert_relative(step, expected_step(z, output, a, b, None))
    half = ddim_step(z.half(), output, a, b)
    assert half.dtype == torch.float16
    assert_relative(half, expected_step(z.half(), output, a, b, None), RELATIVE[torch.float16])


def test_an_index_with_strides(triton_kernels, draw):
    z, a, b, index = draw(2, 3, 4, 4), draw(5), draw(5, 1), torch.tensor([4, 0, 3, 1])[::2]
    assert_relative(ddim_step(z, z, a, b, index), expected_step(z, z, a, b, index))


def test_a_gradient_of_stride_zero(triton_kernels, draw):
    z, a, b = channels_last(draw(2, 3, 4, 4)).requires_grad_(), draw(2), draw(2, 1)
    ddim_step(z, z.detach(), a, b).sum().backward()
    assert_relative(z.grad, a.view(2, 1, 1, 1).expand(2, 3, 4, 4))


def test_opcheck(triton_kernels, draw):
    z, output = channels_last(draw(2, 3, 4, 4)).requires_grad_(), channels_last(draw(2, 6, 4, 4)).requires_grad_()
    arguments = (z, output, draw(5), draw(5, 2), torch.tensor([4, 0]))
    torch.library.opcheck(torch.ops.pdfast_kernels.ddim_step.default, arguments)


def test_what_does_not_fit_is_named(draw):
    z, a, b = draw(2, 3, 4, 4), draw(2), draw(2, 1)
    for arguments, message in [
        ((z, draw(2, 4, 4, 4), a, b), r"output has shape \(2, 4, 4, 4\), expected \(2, 3, 4, 4\)"),
        ((z, z, draw(3), b), r"z_coefficient has shape \(3,\), expected \(2,\)"),
        ((z, z, a, draw(2, 3)), r"output_coefficient has shape \(2, 3\), expected \[R, P\] with P = 1 or 2"),
        ((z, z, a, b, torch.tensor([0])), r"index has shape \(1,\), expected \(2,\)"),
        ((z, z, a, b, torch.tensor([0, 1], dtype=torch.int32)), "index is torch.int32, expected torch.int64"),
        ((z, z.int(), a, b), "output is torch.int32, expected a floating-point type"),
        ((z, z.to("meta"), a, b), "output is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"ddim_step: {message}"):
            ddim_step(*arguments)


def test_unsupported_cases_are_refused_by_the_kernels_and_run_in_pytorch(draw):
    z, output, a, b = draw(2, 3, 4, 4), channels_last(draw(2, 3, 4, 4)), draw(2), draw(2, 1)
    with use("triton"), pytest.raises(ValueError, match="z is torch.float64"):
        ddim_step(z.double(), output, a, b)
    assert_relative(ddim_step(z, output, a, b), expected_step(z, output, a, b, None))


@pytest.mark.parametrize("parts", [1, 2])
def test_tensors_of_several_layouts(triton_kernels, draw, parts):
    """Networks of diffusers return contiguous images for channels-last ones."""
    a, b = draw(2), draw(2, parts)
    z, output = draw(2, 3, 4, 4), draw(2, 3 * parts, 4, 8)[..., ::2]
    for one in (channels_last(z), z, z.transpose(2, 3)):
        for other in (output.contiguous(), channels_last(output), output):
            assert_relative(ddim_step(one, other, a, b), expected_step(one, other, a, b, None))
    with use("triton"):
        meta = ddim_step(*(t.to("meta") for t in (channels_last(z), output.contiguous(), a, b)))
    assert meta.shape == z.shape


def test_compiled_without_a_graph_break(triton_kernels, draw):
    z, output = channels_last(draw(2, 3, 4, 4)).requires_grad_(), channels_last(draw(2, 6, 4, 4))
    arguments = (z, output, draw(5), draw(5, 2), torch.tensor([4, 0]))
    compiled = torch.compile(ddim_step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, ddim_step(*arguments))
    gradient = draw(2, 3, 4, 4)
    expected = torch.autograd.grad(ddim_step(*arguments), z, gradient)[0]
    assert torch.equal(torch.autograd.grad(compiled, z, gradient)[0], expected)
