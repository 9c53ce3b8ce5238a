"""`group_norm` in Triton's interpreter against the formula in float64."""

import sys

import pytest
import torch
from torch import Tensor

from pdfast_kernels import group_norm, use
from pdfast_kernels import reference as plain
from pdfast_kernels.ops.group_norm.group_norm import BACKWARD, FORWARD, _resident, _Shape, backward, forward
from pdfast_kernels.runtime.launch import recorded
from tests.kernels.compare import RELATIVE, assert_relative, channels_last

# Shape and groups: C/G of 8, 3, 6, 10, 1 and all of C; H x W not powers of two; resident and streamed, forward and backward.
CASES = [
    ((2, 32, 4, 4), 4),
    ((1, 64, 8, 8), 8),
    ((3, 24, 8, 8), 8),
    ((2, 192, 4, 4), 32),
    ((2, 320, 6, 5), 32),
    ((2, 30, 5, 7), 3),
    ((1, 8, 3, 3), 8),
    ((2, 16, 1, 1), 1),
    ((2, 1, 5, 5), 1),
    ((40, 8, 2, 2), 4),
    ((1, 64, 14, 14), 1),
    ((1, 64, 40, 40), 2),
    ((2, 40, 30, 30), 4),
    ((1, 6, 130, 130), 1),
    ((2, 256, 2, 2), 128),
    ((2, 1280, 1, 1), 32),
    ((2, 1032, 1, 1), 8),
    ((1, 4100, 1, 1), 1),
]


def expected_group_norm(x, num_groups, weight, bias, eps, scale, shift, silu):
    def of_channels(parameter):
        return parameter.double().reshape(*parameter.shape, *(1,) * (x.dim() - 2))

    n, c = x.shape[:2]
    groups = x.double().reshape(n, num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        y = y * of_channels(weight)
    if bias is not None:
        y = y + of_channels(bias)
    if scale is not None:
        y = y * (1 + of_channels(scale))
    if shift is not None:
        y = y + of_channels(shift)
    return y * torch.sigmoid(y) if silu else y


def check(x, num_groups, draw, *, weight=None, bias=None, scale=None, shift=None, silu=False, relative=None):
    """The result and all gradients; the float64 ones of the same (rounded) inputs."""
    relative = relative or RELATIVE[x.dtype]
    y = group_norm(x, num_groups, weight, bias, 1e-6, scale=scale, shift=shift, silu=silu)
    expected = expected_group_norm(x, num_groups, weight, bias, 1e-6, scale, shift, silu)
    assert y.dtype == x.dtype and y.movedim(1, -1).is_contiguous()
    assert_relative(y, expected, relative)
    inputs = [t for t in (x, weight, bias, scale, shift) if t is not None]
    dy = draw(*x.shape, dtype=x.dtype)
    ours = torch.autograd.grad(y, inputs, dy)
    theirs = torch.autograd.grad(expected, inputs, dy.double())
    for gradient, other, tensor in zip(ours, theirs, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_relative(gradient, other, 4 * relative)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


@pytest.mark.parametrize("shape, num_groups", CASES)
def test_film_and_silu(triton_kernels, draw, shape, num_groups):
    n, c = shape[:2]
    scale, shift = leaf(draw(n, 2 * c)).chunk(2, dim=1)  # the halves of one tensor, as a linear layer gives them
    parameters = {"weight": leaf(draw(c)), "bias": leaf(draw(c)), "scale": scale, "shift": shift}
    check(leaf(channels_last(draw(*shape))), num_groups, draw, **parameters, silu=True)


def test_the_cases_take_every_branch():
    kinds = {
        tuple(
            _resident(_Shape(shape[0], shape[2] * shape[3], shape[1], shape[1] // groups), table.row(90, 1)) is None
            for table in (FORWARD, BACKWARD)
        )
        for shape, groups in CASES
    }
    assert kinds == {(False, False), (False, True), (True, True)}


@pytest.mark.parametrize("shape", [(70_000, 1, 200, 200), (1, 512, 4096, 4096)])
def test_grids_of_any_number_of_samples_and_rows(shape):
    """Only the first axis of a grid goes beyond 65535."""
    x = torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)
    with recorded(90) as launches:
        y, mean, rstd = forward(x, 1, None, None, None, None, 1e-6, True)
        backward(y, x, mean, rstd, 1, None, None, None, None, True)
    assert max(launch.grid[0] for launch in launches) > 65535
    assert all(most <= 65535 for launch in launches for most in launch.grid[1:])


@pytest.mark.parametrize("size", [4, 40])
@pytest.mark.parametrize("there", ["", "w", "b", "wb", "wbs", "f", "wf", "s", "bfs"])
def test_what_may_be_left_out(triton_kernels, draw, size, there):
    parameters = {}
    if "w" in there:
        parameters["weight"] = leaf(draw(32))
    if "b" in there:
        parameters["bias"] = leaf(draw(32))
    if "f" in there:
        parameters["scale"] = leaf(draw(2, 32))
    if "s" in there:
        parameters["shift"] = leaf(draw(2, 32))
    check(leaf(channels_last(draw(2, 32, size, size))), 2, draw, **parameters, silu="s" in there)


@pytest.mark.parametrize("size", [4, 40])
def test_half_precision(triton_kernels, draw, size):
    x = leaf(channels_last(draw(2, 32, size, size, dtype=torch.float16)))
    check(x, 2, draw, weight=leaf(draw(32)), bias=leaf(draw(32, dtype=torch.float16)), silu=True)


@pytest.mark.parametrize("size", [8, 70])
def test_a_mean_of_a_thousand_deviations(triton_kernels, draw, size):
    """What is left is the rounding of x itself: the result is as near as float64's of the same x, to 1e-4."""
    x = channels_last(draw(2, 32, size, size) + 1000 * (1 + torch.arange(32).view(1, 32, 1, 1) // 16))
    y = group_norm(x, 2, eps=1e-6)
    assert_relative(y, expected_group_norm(x, 2, None, None, 1e-6, None, None, False), 1e-4)


@pytest.mark.parametrize("shape", [(3, 32), (2, 32, 10), (2, 32, 3, 4, 5)])
def test_other_than_images(triton_kernels, draw, shape):
    n, c, *rest = shape
    check(leaf(draw(n, *rest, c).movedim(-1, 1)), 4, draw, weight=leaf(draw(c)), silu=True)


def test_no_samples(triton_kernels, draw):
    x, weight = leaf(channels_last(draw(0, 32, 4, 4))), leaf(draw(32))
    y = group_norm(x, 4, weight, silu=True)
    assert y.shape == (0, 32, 4, 4)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(32))


def test_gradients_of_other_strides(triton_kernels, draw):
    x = leaf(channels_last(draw(2, 32, 4, 4)))
    y, expected = group_norm(x, 4, silu=True), expected_group_norm(x, 4, None, None, 1e-5, None, None, True)
    assert_relative(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    dy = draw(2, 32, 4, 4)
    assert not channels_last(dy).is_contiguous() and dy.is_contiguous()


def test_frozen_parameters_get_no_gradient_kernel(triton_kernels, draw, monkeypatch):
    module = sys.modules["pdfast_kernels.ops.group_norm.group_norm"]  # the attribute of that name is the function
    launched, original = [], module.launch

    def spy(kernel, *arguments, **more):
        launched.append(kernel)
        original(kernel, *arguments, **more)

    monkeypatch.setattr(module, "launch", spy)
    x, weight = leaf(channels_last(draw(2, 32, 4, 4))), draw(32)
    group_norm(x, 4, weight).sum().backward()
    assert module.parameter_gradients not in launched
    group_norm(x, 4, leaf(weight)).sum().backward()
    assert module.parameter_gradients in launched


def test_a_sample_alone_and_in_a_batch_has_the_same_bits(triton_kernels, draw):
    for size in (4, 40):
        x = channels_last(draw(3, 32, size, size))
        assert torch.equal(group_norm(x, 2)[1:2], group_norm(x[1:2], 2))


@pytest.mark.parametrize("size", [4, 40])
def test_opcheck(triton_kernels, draw, size):
    x = leaf(channels_last(draw(2, 16, size, size)))
    arguments = (x, 1, leaf(draw(16)), None, leaf(draw(2, 16)), None, 1e-5, True)
    torch.library.opcheck(torch.ops.pdfast_kernels.group_norm.default, arguments)


def test_compiled_without_a_graph_break(triton_kernels, draw):
    x, weight, scale = leaf(channels_last(draw(2, 16, 4, 4))), leaf(draw(16)), leaf(draw(2, 16))

    def norm(x, weight, scale):
        return group_norm(x, 4, weight, scale=scale, silu=True)

    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, weight, scale)
    dy = draw(2, 16, 4, 4)
    ours = torch.autograd.grad(y, (x, weight, scale), dy)
    theirs = torch.autograd.grad(norm(x, weight, scale), (x, weight, scale), dy)
    assert torch.equal(y, norm(x, weight, scale))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_reference(draw):
    x = draw(2, 8, 3, 3, dtype=torch.float64).requires_grad_()
    weight, bias = leaf(draw(8, dtype=torch.float64)), leaf(draw(8, dtype=torch.float64))
    scale, shift = leaf(draw(2, 8, dtype=torch.float64)), leaf(draw(2, 8, dtype=torch.float64))

    def norm(x, weight, bias, scale, shift):
        return plain.group_norm(x, 4, weight, bias, 1e-6, scale=scale, shift=shift, silu=True)

    assert_relative(
        norm(x, weight, bias, scale, shift), expected_group_norm(x, 4, weight, bias, 1e-6, scale, shift, True), 1e-12
    )
    torch.autograd.gradcheck(norm, (x, weight, bias, scale, shift))


def test_what_does_not_fit_is_named(draw):
    x = draw(2, 8, 4, 4)
    for arguments, more, message in [
        ((draw(8), 4), {}, r"x has shape \(8,\), expected \[N, C, ...\]"),
        ((x, 3), {}, r"8 channels of x \(2, 8, 4, 4\) do not divide into num_groups = 3"),
        ((x, 0), {}, r"8 channels of x \(2, 8, 4, 4\) do not divide into num_groups = 0"),
        ((x, 4, draw(4)), {}, r"weight has shape \(4,\), expected \(8,\)"),
        ((x, 4), {"scale": draw(8)}, r"scale has shape \(8,\), expected \(2, 8\)"),
        ((x.int(), 4), {}, "x is torch.int32, expected a floating-point type"),
        ((x, 4, draw(8).to("meta")), {}, "weight is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"group_norm: {message}"):
            group_norm(*arguments, **more)


def test_unsupported_cases_are_refused_by_the_kernels_and_run_in_pytorch(draw):
    x = draw(2, 8, 4, 4)
    with use("triton"), pytest.raises(ValueError, match=r"x has strides \(128, 16, 4, 1\)"):
        group_norm(x, 4)
    with use("triton"), pytest.raises(ValueError, match="x is torch.float64"):
        group_norm(channels_last(x.double()), 4)
    assert_relative(group_norm(x, 4), expected_group_norm(x, 4, None, None, 1e-5, None, None, False))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at its first jvp
def test_forward_mode_is_not_dropped_in_silence(triton_kernels, draw):
    x = channels_last(draw(2, 8, 4, 4))
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: group_norm(x, 4), (x,), (x,))
