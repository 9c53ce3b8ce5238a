"""`ddim_step_weighted_loss` in Triton's interpreter against einsum in float64."""

import math

import pytest
import torch

from pdfast.diffusion import PREDICTIONS, Cosine, StartingAt, build_step_table, to_x
from pdfast_kernels import reference, use
from pdfast_kernels.ops.ddim_step_weighted_loss.ddim_step_weighted_loss import (
    ddim_step_weighted_loss,
    ddim_step_weighted_loss_and_grad,
)
from tests.kernels.compare import RELATIVE, assert_relative, channels_last

SHAPES = [(3, 3, 8, 8), (2, 8, 4, 4), (1, 1, 5, 7), (2, 3, 40, 40), (5, 7), (2, 4, 6), (0, 3, 8, 8), (1, 16, 40, 40)]
OP = torch.ops.pdfast_kernels.ddim_step_weighted_loss.default


def expected_loss(output, z, first, second, a, b, d, c, weight, index=None, huber=0.0):
    n, parts = z.shape[0], b.shape[1]
    rows = torch.arange(n) if index is None else index

    def combine(coefficient, outputs):
        split = outputs.double().reshape(n, parts, math.prod(z.shape[1:]))
        return torch.einsum("np,npe->ne", coefficient.double()[rows], split)

    target = torch.einsum("n,ne->ne", a.double()[rows], z.double().reshape(n, math.prod(z.shape[1:])))
    error = combine(c, output) - target - combine(b, first) - combine(d, second)
    squared = weight.double()[rows, None] * error.square()
    return (2 * huber * ((squared + huber**2).sqrt() - huber) if huber else squared).mean(1)


@pytest.fixture
def arguments(draw):
    """arguments(shape, parts): all of them in the operation's order, output first, with 5 rows and an index."""

    def make(shape, parts, layout=torch.channels_last, dtype=torch.float32, rows=5):
        n, c, *rest = shape
        layout = layout if len(shape) == 4 else torch.contiguous_format
        wide = (n, parts * c, *rest)
        output, z, first, second = (
            draw(*s, dtype=dtype).contiguous(memory_format=layout) for s in (wide, shape, wide, wide)
        )
        columns = draw(rows), draw(rows, parts), draw(rows, parts), draw(rows, parts), draw(rows).abs()
        return output.requires_grad_(), z, first, second, *columns, torch.tensor([4, 0, 3, 3, 1])[:n]

    return make


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(triton_kernels, draw, arguments, shape, parts, layout):
    if layout is torch.channels_last and len(shape) != 4:
        pytest.skip("only images have channels-last strides")
    tensors = arguments(shape, parts, layout)
    output = tensors[0]
    loss, expected = ddim_step_weighted_loss(*tensors), expected_loss(*tensors)
    assert loss.dtype == torch.float32
    assert_relative(loss, expected)

    gradient = draw(shape[0])
    ours = torch.autograd.grad(loss, output, gradient)[0]
    theirs = torch.autograd.grad(expected, output, gradient.double())[0]
    assert ours.dtype == output.dtype and ours.stride() == output.stride()
    assert_relative(ours, theirs)

    both = ddim_step_weighted_loss_and_grad(*tensors, grad_scale=0.3)
    assert torch.equal(both[0], loss) and not any(t.requires_grad for t in both)
    theirs = 0.3 * torch.autograd.grad(expected_loss(*tensors).sum(), output)[0]
    assert both[1].dtype == output.dtype and both[1].stride() == output.stride()
    assert_relative(both[1], theirs)


@pytest.mark.parametrize("huber", [1e-3, 0.3, 1e3])
@pytest.mark.parametrize("parts", [1, 2])
def test_pseudo_huber(triton_kernels, arguments, parts, huber):
    """All of its range: hardly an error below h, about half of them, all of them; where the last is the squared error."""
    for dtype in (torch.float32, torch.float16):
        tensors, up = arguments((2, 3, 40, 40), parts, dtype=dtype), 2.0**12  # or fp16 has no number for a gradient
        output, expected = tensors[0], expected_loss(*tensors, huber=huber)
        bound = max(RELATIVE[dtype], 5e-7 / huber)  # an error near 0, in float32, next to h: there the slope is steep
        theirs = torch.autograd.grad(up * expected.sum(), output)[0]
        for one in (ddim_step_weighted_loss, reference.ddim_step_weighted_loss):
            loss = one(*tensors, huber)
            assert_relative(loss, expected)
            assert_relative(torch.autograd.grad(up * loss.sum(), output)[0], theirs, bound)
        for one in (ddim_step_weighted_loss_and_grad, reference.ddim_step_weighted_loss_and_grad):
            with torch.no_grad():
                loss, grad = one(*tensors, grad_scale=up, huber=huber)
            assert_relative(loss, expected)
            assert_relative(grad, theirs, bound)
        if huber == 1e3:
            torch.testing.assert_close(loss, ddim_step_weighted_loss(*tensors).detach(), rtol=1e-4, atol=0)


def test_pseudo_huber_where_nothing_is_wrong(triton_kernels, arguments):
    """No error: no loss and no gradient, not 0 / 0."""
    tensors = [t.detach() if t.is_floating_point() else t for t in arguments((2, 3, 4, 4), 1)]
    for weight in (tensors[8], 0 * tensors[8]):
        still = (0 * tensors[0]).requires_grad_(), *(0 * t for t in tensors[1:4]), *tensors[4:8], weight, tensors[9]
        loss = ddim_step_weighted_loss(*still, 0.1)
        assert not loss.any() and not torch.autograd.grad(loss.sum(), still[0])[0].any()


@pytest.mark.parametrize("huber", [-1.0, float("nan"), float("inf")])
def test_a_huber_that_is_none(arguments, huber):
    tensors = arguments((2, 3, 4, 4), 1)
    with pytest.raises(ValueError, match="ddim_step_weighted_loss: huber is .*, expected a number from 0"):
        ddim_step_weighted_loss(*tensors, huber)
    with pytest.raises(ValueError, match="ddim_step_weighted_loss_and_grad: huber is .*, expected a number from 0"):
        ddim_step_weighted_loss_and_grad(*tensors, grad_scale=1.0, huber=huber)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_distillation_loss_of_every_prediction(triton_kernels, draw, prediction):
    """The columns of a real table, and the paper's target: where the teacher's two steps end."""
    table = build_step_table(StartingAt(Cosine(), 0.9), 4, prediction, "snr", dtype=torch.float64)
    k = torch.tensor([0, 2, 1])
    z, phi, phi_mid, phi_next = draw(3, 3, 4, 4).double(), *(t[k].view(-1, 1, 1, 1) for t in table.columns()[:3])
    o, o1, o2 = (draw(3, 6 if prediction == "both" else 3, 4, 4).double() for _ in range(3))

    def x_and_step(z, output, phi, end):
        x = to_x(prediction, output, z, phi.flatten())
        eps = (z - torch.cos(phi) * x) / torch.sin(phi)
        return x, torch.cos(end) * x + torch.sin(end) * eps

    _, z_mid = x_and_step(z, o1, phi, phi_mid)
    _, z_next = x_and_step(z_mid, o2, phi_mid, phi_next)
    ratio = torch.sin(phi_next) / torch.sin(phi)
    x_target = (z_next - ratio * z) / (torch.cos(phi_next) - ratio * torch.cos(phi))
    x, _ = x_and_step(z, o, phi, phi)
    snr = 1 / torch.tan(phi) ** 2
    expected = (snr * (x - x_target) ** 2).mean((1, 2, 3))
    columns = table.target_z, *table.target_output, table.output, table.weight
    tensors = [t.float() for t in (o, z, o1, o2, *columns)]
    assert_relative(ddim_step_weighted_loss(*tensors, k), expected)


def test_a_row_for_each_sample_and_other_dtypes(triton_kernels, arguments):
    output, z, *others, _ = arguments((3, 3, 8, 8), 2, rows=3)
    assert_relative(ddim_step_weighted_loss(output, z, *others), expected_loss(output, z, *others))
    half = output.detach().half().requires_grad_()
    assert_relative(ddim_step_weighted_loss(half, z, *others), expected_loss(half, z, *others))
    mixed = half, z.half(), others[0].half(), *others[1:]
    loss, expected = ddim_step_weighted_loss(*mixed), expected_loss(*mixed)
    assert_relative(loss, expected)
    ours = torch.autograd.grad(loss.sum(), half)[0]
    theirs = torch.autograd.grad(expected.sum(), half)[0]
    assert ours.dtype == torch.float16
    assert_relative(ours, theirs, RELATIVE[torch.float16])


def test_small_gradients_survive_half_precision(triton_kernels, arguments):
    """Divided by C H W they would be subnormal numbers until the incoming gradient, a loss scale, lifts them."""
    output, z, *others, weight, index = arguments((1, 3, 16, 16), 1, dtype=torch.float16)
    tensors = output, z, *others, 1e-4 * weight, index
    loss, expected = ddim_step_weighted_loss(*tensors), expected_loss(*tensors)
    ours, theirs = (torch.autograd.grad(2.0**16 * one.sum(), output)[0] for one in (loss, expected))
    assert_relative(ours, theirs, 2e-3)


def test_no_gradient_is_computed_where_none_is_wanted(triton_kernels, arguments):
    tensors = arguments((2, 3, 4, 4), 1)
    columns = (*tensors[4:], 0.0, False)
    assert OP(tensors[0].detach(), *tensors[1:4], *columns)[1].numel() == 0
    with torch.no_grad():
        loss = ddim_step_weighted_loss(*tensors)
    assert not loss.requires_grad and torch.equal(loss, ddim_step_weighted_loss(*tensors))


def test_a_gradient_of_stride_zero(triton_kernels, arguments):
    tensors = arguments((2, 3, 4, 4), 1)
    ddim_step_weighted_loss(*tensors).sum().backward()
    assert_relative(tensors[0].grad, torch.autograd.grad(expected_loss(*tensors).sum(), tensors[0])[0])


def test_strided_columns_and_index(triton_kernels, arguments):
    tensors = [t.detach() for t in arguments((2, 3, 4, 4), 2)]
    columns = [torch.stack([c, 0 * c], dim=-1)[..., 0] for c in tensors[4:9]]
    strided = *tensors[:4], *columns, torch.tensor([4, 1, 0, 1])[::2]
    assert torch.equal(ddim_step_weighted_loss(*strided), ddim_step_weighted_loss(*tensors))


def test_the_same_bits_on_every_run(triton_kernels, arguments):
    tensors = arguments((2, 3, 40, 40), 1)
    assert torch.equal(ddim_step_weighted_loss(*tensors), ddim_step_weighted_loss(*tensors))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_reference(arguments, parts):
    tensors = [t.detach().double() if t.is_floating_point() else t for t in arguments((3, 2, 2, 3), parts)]
    output = tensors[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda o: ddim_step_weighted_loss(o, *tensors[1:]), (output,))
    loss, grad = ddim_step_weighted_loss_and_grad(*tensors, grad_scale=0.7)
    assert loss.dtype == grad.dtype == torch.float64 and grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss, expected_loss(*tensors).detach())
    torch.testing.assert_close(grad, 0.7 * torch.autograd.grad(expected_loss(*tensors).sum(), output)[0])
    without_index = [*tensors[:4], *(column[tensors[-1]] for column in tensors[4:9])]
    assert torch.equal(ddim_step_weighted_loss(*without_index), ddim_step_weighted_loss(*tensors))


def test_opcheck(triton_kernels, arguments):
    for parts in (1, 2):
        tensors = arguments((2, 3, 4, 4), parts)
        torch.library.opcheck(OP, (*tensors, 0.1, True))
        detached = tensors[0].detach(), *tensors[1:]
        torch.library.opcheck(OP, (*detached, 0.0, False))
        torch.library.opcheck(torch.ops.pdfast_kernels.ddim_step_weighted_loss_and_grad.default, (*detached, 0.0, 0.3))


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_compiled_without_a_graph_break(triton_kernels, arguments, mode):
    tensors = arguments((2, 3, 4, 4), 2)
    with use(mode):
        torch.compiler.reset()
        compiled = torch.compile(ddim_step_weighted_loss, fullgraph=True, backend="aot_eager")(*tensors)
        loss = ddim_step_weighted_loss(*tensors)
        assert torch.equal(compiled, loss)
        ours, theirs = (torch.autograd.grad(one.sum(), tensors[0])[0] for one in (compiled, loss))
        assert torch.equal(ours, theirs)
        both = torch.compile(ddim_step_weighted_loss_and_grad, fullgraph=True, backend="aot_eager")
        for one, other in zip(
            both(*tensors, grad_scale=0.3), ddim_step_weighted_loss_and_grad(*tensors, grad_scale=0.3), strict=True
        ):
            assert torch.equal(one, other) and not one.requires_grad


def test_what_does_not_fit_is_named(draw, arguments):
    good = [t.detach() for t in arguments((2, 3, 4, 4), 1)]
    names = ["output", "z", "teacher_output", "teacher_output_mid", "target_z", "target_output", "target_output_mid"]
    names += ["output_coefficient", "weight", "index"]
    for name, wrong, message in [
        ("z", draw(2), r"z has shape \(2,\), expected \[N, C, ...\]"),
        ("output_coefficient", draw(5, 3), r"output_coefficient has shape \(5, 3\), expected \[R, P\] with P = 1 or 2"),
        ("output", draw(2, 4, 4, 4), r"output has shape \(2, 4, 4, 4\), expected \(2, 3, 4, 4\)"),
        ("teacher_output", draw(2, 3, 4), r"teacher_output has shape \(2, 3, 4\), expected \(2, 3, 4, 4\)"),
        ("teacher_output_mid", draw(2, 6, 4), r"teacher_output_mid has shape \(2, 6, 4\), expected \(2, 3, 4, 4\)"),
        ("target_z", draw(4), r"target_z has shape \(4,\), expected \(5,\)"),
        ("target_output", draw(5, 2), r"target_output has shape \(5, 2\), expected \(5, 1\)"),
        ("target_output_mid", draw(5), r"target_output_mid has shape \(5,\), expected \(5, 1\)"),
        ("weight", draw(5, 1), r"weight has shape \(5, 1\), expected \(5,\)"),
        ("index", torch.tensor([0]), r"index has shape \(1,\), expected \(2,\)"),
        ("index", torch.tensor([0, 1], dtype=torch.int32), "index is torch.int32, expected torch.int64"),
        ("teacher_output", good[2].int(), "teacher_output is torch.int32, expected a floating-point type"),
        ("weight", good[8].to("meta"), "weight is on meta, the others are on cpu"),
        ("index", None, r"target_z has shape \(5,\), expected \(2,\)"),
    ]:
        arguments_ = [wrong if name == n else t for n, t in zip(names, good, strict=True)]
        with pytest.raises(ValueError, match=f"ddim_step_weighted_loss: {message}"):
            ddim_step_weighted_loss(*arguments_)
        with pytest.raises(ValueError, match=f"ddim_step_weighted_loss_and_grad: {message}"):
            ddim_step_weighted_loss_and_grad(*arguments_, grad_scale=1.0)


def test_unsupported_cases_are_refused_by_the_kernels_and_run_in_pytorch(triton_kernels, arguments):
    output, z, *others = arguments((2, 3, 4, 4), 1)
    wanting = z.clone().requires_grad_()
    for tensors, message in [
        ((output, z.double(), *others), "z is torch.float64"),
        ((output, wanting, *others), "the gradient with respect to output alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            ddim_step_weighted_loss(*tensors)
        with use("auto"):
            assert_relative(ddim_step_weighted_loss(*tensors), expected_loss(*tensors))
    with use("auto"):
        ours, theirs = (f(output, wanting, *others).sum() for f in (ddim_step_weighted_loss, expected_loss))
    assert_relative(torch.autograd.grad(ours, wanting)[0], torch.autograd.grad(theirs, wanting)[0])
    assert torch.equal(
        *(ddim_step_weighted_loss_and_grad(output, one, *others, grad_scale=1.0)[1] for one in (z, wanting))
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_tensors_of_several_layouts(triton_kernels, arguments, parts):
    """The gradient is the output's, whatever it was copied to."""
    output, z, first, second, *columns = arguments((2, 3, 4, 4), parts)
    mixed = output.contiguous(), z, first[:, :, ::2, ::2].repeat(1, 1, 2, 2), second.contiguous()
    assert_relative(ddim_step_weighted_loss(*mixed, *columns), expected_loss(*mixed, *columns))
    one = mixed[0].requires_grad_()
    ours, theirs = (f(one, *mixed[1:], *columns).sum() for f in (ddim_step_weighted_loss, expected_loss))
    expected = torch.autograd.grad(theirs, one)[0]
    assert_relative(torch.autograd.grad(ours, one)[0], expected)
    _, at_once = ddim_step_weighted_loss_and_grad(*mixed, *columns, grad_scale=1.0)
    assert_relative(at_once, expected)


def test_engine_style_backward(triton_kernels, draw, arguments):
    """The gradient goes straight into the network's backward."""
    w = draw(3, 3).requires_grad_()
    _, z, *others = arguments((2, 3, 4, 4), 1)

    def network():
        return channels_last(torch.einsum("oc,nchw->nohw", w, z))

    output = network()
    _, grad = ddim_step_weighted_loss_and_grad(output, z, *others, grad_scale=0.5)
    torch.autograd.backward(output, grad)
    theirs = torch.autograd.grad(0.5 * expected_loss(network(), z, *others).sum(), w)[0]
    assert_relative(w.grad, theirs)
