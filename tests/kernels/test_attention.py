"""`attention` and `attention_packed` in Triton's interpreter against softmax and einsum in float64."""

import importlib

import pytest
import torch

from pdfast_kernels import reference, use
from pdfast_kernels.ops.attention.attention import attention, attention_packed
from pdfast_kernels.runtime.configs import ANY
from pdfast_kernels.runtime.launch import recorded
from tests.kernels.compare import RELATIVE, assert_relative

module = importlib.import_module("pdfast_kernels.ops.attention.attention")

# N, L, heads, D, dtype, and the kernels that run: of one tile, with all keys on chip, and streaming; even and odd L,
# padded D.
CASES = [
    (2, 16, 2, 32, torch.float32, "forward_resident", "backward_tile"),
    (1, 5, 1, 8, torch.float32, "forward_resident", "backward_tile"),
    (1, 64, 2, 64, torch.float16, "forward_resident", "backward_tile"),
    (1, 100, 1, 80, torch.float16, "forward_resident", "backward_tile"),
    (1, 32, 2, 64, torch.float32, "forward_resident", "backward_resident"),
    (2, 17, 3, 40, torch.float32, "forward_resident", "backward_resident"),
    (1, 200, 1, 40, torch.float16, "forward_resident", "backward_stream"),
    (1, 64, 2, 32, torch.float32, "forward_stream", "backward_stream"),
    (2, 100, 1, 40, torch.float32, "forward_stream", "backward_stream"),
    (1, 33, 1, 128, torch.float32, "forward_stream", "backward_stream"),
    (1, 300, 1, 32, torch.float16, "forward_stream", "backward_stream"),
    (1, 384, 2, 64, torch.float16, "forward_stream", "backward_stream"),
    (1, 70, 1, 160, torch.float16, "forward_stream", "backward_stream"),
]


@pytest.fixture
def kernels(triton_kernels):
    """All of them in float32 too, at L = 17 to 32 the one with all keys on chip, which else only half precision has."""
    tile = module.BACKWARD_FP32.row(90, 1, 1)
    resident = module.Config(32, 64, module.backward_resident, 32, 16, 4, 1)
    with module.BACKWARD_FP32.overridden(tile._replace(keys=16), resident):
        yield


def expected_attention(q, k, v, scale=None):
    q, k, v = q.double(), k.double(), v.double()
    score = torch.einsum("nlhd,nmhd->nhlm", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    weight = torch.exp(score - score.amax(3, keepdim=True))
    return torch.einsum("nhlm,nmhd->nlhd", weight / weight.sum(3, keepdim=True), v)


def check(ours, expected, inputs, gradient, relative):
    assert_relative(ours, expected, relative)
    theirs = torch.autograd.grad(expected, inputs, gradient.double())
    for one, other, like in zip(torch.autograd.grad(ours, inputs, gradient), theirs, inputs, strict=True):
        assert one.shape == like.shape and one.dtype == like.dtype
        assert_relative(one, other, relative)


@pytest.mark.parametrize(("n", "length", "heads", "dim", "dtype", "forward", "backward"), CASES)
def test_values_and_gradients(kernels, draw, n, length, heads, dim, dtype, forward, backward):
    q, k, v = (draw(n, length, heads, dim, dtype=dtype).requires_grad_() for _ in range(3))
    assert module._config(False, q).kernel.__name__ == forward and module._config(True, q).kernel.__name__ == backward
    out = attention(q, k, v)
    assert out.dtype == dtype and out.is_contiguous()
    gradient = draw(n, length, heads, dim, dtype=dtype)
    check(out, expected_attention(q, k, v), (q, k, v), gradient, RELATIVE[dtype])
    if dtype == torch.float16:  # on other GPUs, such as those with less shared memory, by other kernels
        for arch in (ANY, 100):
            rows = (table.overridden(*table.rows[arch]) for table in (module.FORWARD, module.BACKWARD))
            with next(rows), next(rows):
                check(attention(q, k, v), expected_attention(q, k, v), (q, k, v), gradient, RELATIVE[dtype])


@pytest.mark.parametrize("length", [16, 30, 40])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_packed(kernels, draw, length, scale):
    qkv = draw(2, length, 3, 2, 40).requires_grad_()
    out = attention_packed(qkv, scale)
    assert out.is_contiguous()
    check(out, expected_attention(*qkv.unbind(2), scale), (qkv,), draw(2, length, 2, 40), RELATIVE[torch.float32])


@pytest.mark.parametrize("length", [16, 30, 40])
def test_other_strides(kernels, draw, length):
    n, heads, dim = 2, 2, 32
    heads_first = draw(n, length, heads, 3, dim).permute(0, 1, 3, 2, 4).requires_grad_()
    length_first = draw(length, n, 3, heads, dim).transpose(0, 1).requires_grad_()
    part = draw(n, length, 3, heads, dim + 7)[..., 3:-4].requires_grad_()  # not dense, and no multiple of 16 bytes
    broadcast = draw(1, length, 3, heads, dim).expand(n, -1, -1, -1, -1).requires_grad_()
    gradient = draw(n, heads, length, dim).transpose(1, 2)
    for qkv in (heads_first, length_first, part, broadcast):
        expected = expected_attention(*qkv.unbind(2))
        check(attention_packed(qkv), expected, (qkv,), gradient, RELATIVE[torch.float32])
        expected = expected_attention(*qkv.unbind(2))
        check(attention(*qkv.unbind(2)), expected, (qkv,), gradient, RELATIVE[torch.float32])
    (ours,) = torch.autograd.grad(attention_packed(heads_first), heads_first, gradient)
    assert ours.stride() == heads_first.stride()
    q, k, v = heads_first[:, :, 0], length_first[:, :, 1], part[:, :, 2]  # each with strides of its own
    check(attention(q, k, v), expected_attention(q, k, v), (q, k, v), gradient, RELATIVE[torch.float32])


def test_packing_by_heads_computed_by_a_linear_layer(kernels, draw):
    """The gradient of qkv reaches the linear layer without a copy."""
    x, weight = draw(2, 20, 16).requires_grad_(), (draw(96, 16) / 4).requires_grad_()
    qkv = (x @ weight.T).view(2, 20, 2, 3, 16)
    strides = []
    qkv.register_hook(lambda gradient: strides.append(gradient.is_contiguous()))
    check(
        attention_packed(qkv.transpose(2, 3)),
        expected_attention(*(x.double() @ weight.double().T).view(2, 20, 2, 3, 16).unbind(3)),
        (x, weight),
        draw(2, 20, 2, 16),
        RELATIVE[torch.float32],
    )
    assert strides == [True]


@pytest.mark.parametrize("length", [13, 27, 45])
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores(kernels, draw, length, sign):
    """Of hundreds of one sign: neither what is padded (score 0) nor the exponential overflows."""
    q, k, v = 6 + draw(1, length, 1, 32), sign * (6 + draw(1, length, 1, 32)), draw(1, length, 1, 32)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    relative = 5e-4  # float32 keeps scores of 200 to 1e-5, which the gradients multiply; PyTorch's are no nearer
    check(attention(*inputs), expected_attention(*inputs), inputs, draw(1, length, 1, 32), relative)


def test_many_samples_share_their_programs(kernels, draw, monkeypatch):
    qkv = draw(2, 48, 3, 2, 32, dtype=torch.float16)
    with module.FORWARD.overridden(module.Config(64, 64, module.forward_resident, 16, 64, 4, 2)):
        few = attention_packed(qkv)
        monkeypatch.setattr(module, "MANY_PAIRS", 4)
        assert torch.equal(attention_packed(qkv), few)
    assert_relative(few, expected_attention(*qkv.unbind(2)), RELATIVE[torch.float16])


def test_the_same_bits_in_every_run_and_any_batch(kernels, draw):
    for length in (16, 30, 40):
        qkv, gradient = draw(3, length, 3, 1, 32), draw(3, length, 1, 32)
        results = []
        for samples in (slice(0, 3), slice(0, 3), slice(2, 3)):
            part = qkv[samples].requires_grad_()
            out = attention_packed(part)
            results.append((out[-1].detach(), torch.autograd.grad(out, part, gradient[samples])[0][-1]))
        for again in results[1:]:
            assert torch.equal(results[0][0], again[0]) and torch.equal(results[0][1], again[1])


def test_a_gradient_of_stride_zero_and_some_inputs_without(kernels, draw):
    for length in (16, 30, 40):
        q, k, v = (draw(1, length, 1, 32) for _ in range(3))
        q.requires_grad_(), v.requires_grad_()
        attention(q, k, v).sum().backward()
        expected = torch.autograd.grad(expected_attention(q, k, v).sum(), v)[0]
        assert_relative(v.grad, expected)
        assert k.grad is None and q.grad.isfinite().all()


def test_no_samples_and_no_gradient(kernels, draw):
    qkv = draw(0, 16, 3, 2, 32).requires_grad_()
    out = attention_packed(qkv)
    assert out.shape == (0, 16, 2, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert attention(*qkv.unbind(2)).shape == (0, 16, 2, 32)
    with torch.no_grad():
        assert not attention_packed(draw(1, 16, 3, 1, 32).requires_grad_()).requires_grad


@pytest.mark.parametrize("n", [0, 1])
def test_launches_on_meta_tensors_are_listed(n):
    for dtype in (torch.bfloat16, torch.float32):
        for length, dim in ((64, 128), (256, 64), (1024, 40)):
            qkv = torch.empty(n, length, 3, 2, dim, dtype=dtype, device="meta")
            with recorded(90) as launches:
                out, lse = module.forward(*qkv.unbind(2), 1.0)
                gradient = module.empty_gradient(qkv)
                module.backward(out, *qkv.unbind(2), out, lse, 1.0, gradient.unbind(2))
            assert bool(launches) == bool(n)
            assert all(name in launch.arguments for launch in launches for name in launch.kernel.arg_names)


@pytest.mark.parametrize("length", [16, 20, 40])
def test_opcheck(kernels, draw, length):
    q, k, v = (draw(2, length, 1, 16).requires_grad_() for _ in range(3))
    torch.library.opcheck(torch.ops.pdfast_kernels.attention.default, (q, k, v, 0.25))
    qkv = draw(2, length, 3, 1, 16).requires_grad_()
    torch.library.opcheck(torch.ops.pdfast_kernels.attention_packed.default, (qkv, 0.25))
    by_heads = draw(1, length, 2, 3, 16).transpose(2, 3).requires_grad_()
    torch.library.opcheck(torch.ops.pdfast_kernels.attention_packed.default, (by_heads, 0.25))


def test_compiled_without_a_graph_break(kernels, draw):
    qkv, gradient = draw(2, 20, 3, 2, 16).requires_grad_(), draw(2, 20, 2, 16)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(2))
    for function, arguments in ((attention_packed, (qkv,)), (attention, (q, k, v))):
        out = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        again = function(*arguments)
        assert torch.equal(out, again)
        results = (torch.autograd.grad(result, arguments, gradient) for result in (out, again))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_does_not_fit_is_named(draw):
    q, qkv = draw(2, 16, 2, 32), draw(2, 16, 3, 2, 32)
    for arguments, message in [
        ((q[0], q, q), r"q has shape \(16, 2, 32\), expected \[N, L, heads, D\]"),
        ((q, q[:, :8], q), r"k has shape \(2, 8, 2, 32\), expected that of q, \(2, 16, 2, 32\)"),
        ((q, q, q[:1]), r"v has shape \(1, 16, 2, 32\), expected that of q, \(2, 16, 2, 32\)"),
        ((q, q, q.half()), "v is torch.float16, expected that of q, torch.float32"),
        ((q.int(), q.int(), q.int()), "q is torch.int32, expected a floating-point type"),
        ((q, q.to("meta"), q), "k is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"attention: {message}"):
            attention(*arguments)
    for argument, message in [
        (q, r"qkv has shape \(2, 16, 2, 32\), expected \[N, L, 3, heads, D\]"),
        (qkv.transpose(2, 3), r"qkv has shape \(2, 16, 2, 3, 32\), expected \[N, L, 3, heads, D\]"),
        (qkv.int(), "qkv is torch.int32, expected a floating-point type"),
    ]:
        with pytest.raises(ValueError, match=f"attention_packed: {message}"):
            attention_packed(argument)


def test_unsupported_cases_are_refused_by_the_kernels_and_run_in_pytorch(draw):
    plain = draw(1, 16, 3, 2, 32)
    for qkv, scale, message in [
        (plain.double(), None, "qkv is torch.float64"),
        (draw(1, 16, 3, 2, 20), None, "head_dim 20, not a multiple of 8 up to 128"),
        (draw(1, 16, 3, 2, 136), None, "head_dim 136, not a multiple of 8 up to 128"),
        (draw(1, 16, 3, 2, 264, dtype=torch.float16), None, "head_dim 264, not a multiple of 8 up to 256"),
        (draw(1, 16, 3, 2, 64)[..., ::2], None, "not 1 for D"),
        (plain, -1.0, "scale is -1.0, not positive"),
    ]:
        with use("triton"), pytest.raises(ValueError, match=message):
            attention_packed(qkv, scale)
        relative = RELATIVE.get(qkv.dtype, RELATIVE[torch.float32])
        assert_relative(attention_packed(qkv, scale), expected_attention(*qkv.unbind(2), scale), relative)
        assert_relative(attention(*qkv.unbind(2), scale), expected_attention(*qkv.unbind(2), scale), relative)


def test_the_reference(draw):
    qkv = draw(2, 5, 3, 2, 8, dtype=torch.float64).requires_grad_()
    q, k, v = qkv.unbind(2)
    assert_relative(reference.attention(q, k, v, 0.5), expected_attention(q, k, v, 0.5), 1e-12)
    assert reference.attention_packed(qkv).is_contiguous()
    torch.autograd.gradcheck(reference.attention_packed, (qkv,))
    torch.autograd.gradcheck(reference.attention, tuple(t.detach().requires_grad_() for t in (q, k, v)))
