"""The kernels and plain PyTorch give the same of the same arguments: dtypes, layouts, gradients, under autocast too.

The rule of dtypes stands in `dispatch.py`. Both paths are tried with every combination of dtypes; the kernels (in the
interpreter) with those they have.
"""

import itertools

import pytest
import torch
from torch import Tensor

from pdfast_kernels import (
    attention,
    attention_packed,
    ddim_step,
    ddim_step_weighted_loss,
    ddim_step_weighted_loss_and_grad,
    diffuse,
    group_norm,
    group_norm_attention,
    noise_key,
    use,
)
from pdfast_kernels.runtime.dispatch import DTYPES, KERNEL_DTYPES
from tests.kernels.compare import assert_relative, channels_last

BF16, FP16, FP32, FP64 = DTYPES
N, C = 2, 8
ROUNDING = {
    BF16: 2.0**-8,
    FP16: 2.0**-11,
    FP32: 2.0**-24,
    FP64: 2.0**-24,
}  # float64 parameters reach a kernel as float32


def both(function, arguments: dict, like: str | None, tolerance: float | None = 16) -> Tensor | tuple[Tensor, ...]:
    """What plain PyTorch returns, after a comparison with the kernels where they take the dtypes of the tensors that stream.

    like: the argument that has the result's dtype. A gradient has that of what it is of. The values agree to `tolerance`
    roundings of the coarsest dtype in it; None where the interpreter has none (its products of bf16)."""
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point()}
    tensors = {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    inputs = [t for t in tensors.values() if t.requires_grad]
    seen = {}
    for mode in ("reference", "triton"):
        with use(mode):
            try:
                y = function(**arguments | tensors)
            except ValueError as error:
                assert mode == "triton" and "not bfloat16, float16 or float32" in str(error)
                assert FP64 in {t.dtype for t in tensors.values()}
                continue
            results = y if isinstance(y, tuple) else (y,)
            if inputs:
                results += torch.autograd.grad(results[0], inputs, torch.ones_like(results[0]))
        seen[mode] = results
        if like:
            assert results[0].dtype == tensors[like].dtype, mode
        for gradient, tensor in zip(results[1:] if inputs else (), inputs, strict=False):
            assert gradient.dtype == tensor.dtype, mode
    if tolerance is None:
        return seen["reference"]
    coarsest = max(ROUNDING[t.dtype] for t in tensors.values())
    for plain, ours in zip(*seen.values(), strict=True) if len(seen) == 2 else ():
        assert plain.dtype == ours.dtype and plain.stride() == ours.stride()
        assert_relative(ours, plain, tolerance * coarsest)
    return seen["reference"]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_group_norm(triton_kernels, draw, x, weight):
    shape = (N, C, 3, 3)
    for film in DTYPES:
        arguments = {"x": leaf(channels_last(draw(*shape, dtype=x))), "num_groups": 2, "silu": True}
        arguments |= {name: leaf(draw(C, dtype=weight)) for name in ("weight", "bias")}
        arguments |= {name: leaf(draw(N, C, dtype=film)) for name in ("scale", "shift")}
        both(group_norm, arguments, "x", 64)


@pytest.mark.parametrize("mixed", list(itertools.permutations(DTYPES)), ids=str)
def test_group_norm_all_different(triton_kernels, draw, mixed):
    names = ("weight", "bias", "scale", "shift")
    shapes = ((C,), (C,), (N, C), (N, C))
    parameters = {n: leaf(draw(*s, dtype=d)) for n, s, d in zip(names, shapes, mixed, strict=True)}
    for dropped in (None, *names):
        arguments = {"x": leaf(channels_last(draw(N, C, 2, 2, dtype=mixed[0]))), "num_groups": 2}
        with use("reference"):
            y = group_norm(**arguments, **{n: p for n, p in parameters.items() if n != dropped})
        assert y.dtype == mixed[0]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # NumPy's, of the products of bf16
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("parameter", DTYPES)
def test_group_norm_attention(triton_kernels, draw, x, parameter):
    shapes = {"norm_weight": (C,), "norm_bias": (C,), "qkv_weight": (3 * C, C), "qkv_bias": (3 * C,)}
    shapes |= {"proj_weight": (C, C), "proj_bias": (C,)}
    arguments = {name: leaf(draw(*shape, dtype=parameter)) for name, shape in shapes.items()}
    arguments |= {"x": leaf(channels_last(draw(N, C, 2, 2, dtype=x))), "num_groups": 2, "num_heads": 1}
    both(group_norm_attention, arguments, "x", None if x == BF16 else 1024)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(triton_kernels, draw, dtype):
    arguments = {name: leaf(draw(N, 4, 1, C, dtype=dtype)) for name in "qkv"}
    tolerance = None if dtype == BF16 else 64
    both(attention, arguments, "q", tolerance)
    both(attention_packed, {"qkv": leaf(draw(N, 4, 3, 1, C, dtype=dtype))}, "qkv", tolerance)
    for other in DTYPES:
        if other != dtype:
            for mode in ("reference", "triton"):
                with use(mode), pytest.raises(ValueError, match=f"k is {other}, expected that of q, {dtype}"):
                    attention(arguments["q"], arguments["k"].to(other), arguments["v"])


@pytest.mark.parametrize("z", DTYPES)
@pytest.mark.parametrize("output", DTYPES)
def test_ddim_step(triton_kernels, draw, z, output):
    for column in DTYPES:
        arguments = {"z": leaf(draw(N, C, 3, dtype=z)), "output": leaf(draw(N, C, 3, dtype=output))}
        arguments |= {"z_coefficient": draw(N, dtype=column), "output_coefficient": draw(N, 1, dtype=column)}
        both(ddim_step, arguments, "z")


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("z", DTYPES)
def test_the_loss(triton_kernels, draw, output, z):
    for column, teacher in zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True):
        arguments = {"output": leaf(draw(N, C, 3, dtype=output)), "z": draw(N, C, 3, dtype=z)}
        arguments |= {name: draw(N, C, 3, dtype=teacher) for name in ("teacher_output", "teacher_output_mid")}
        arguments |= {name: draw(N, dtype=column).abs() for name in ("target_z", "weight")}
        columns = ("target_output", "target_output_mid", "output_coefficient")
        arguments |= {name: draw(N, 1, dtype=column) for name in columns}
        expected = FP64 if FP64 in (output, z, teacher) else FP32
        loss, _ = both(ddim_step_weighted_loss, arguments, None, 64)
        assert loss.dtype == expected
        arguments["output"] = arguments["output"].detach()
        loss, gradient = both(lambda **t: ddim_step_weighted_loss_and_grad(**t, grad_scale=0.5), arguments, None, 64)
        assert loss.dtype == expected and gradient.dtype == output


@pytest.mark.parametrize("dtype", DTYPES)
def test_diffuse(triton_kernels, draw, dtype):
    images, index = torch.zeros(N, 4, 4, 1, dtype=torch.uint8), torch.arange(N)
    for phi in DTYPES:
        for mode in ("triton", "reference") if dtype in KERNEL_DTYPES else ("reference",):
            with use(mode):
                assert diffuse(images, draw(N, dtype=phi), noise_key(0), index, dtype=dtype).dtype == dtype


def test_other_dtypes_are_refused_on_both_paths(triton_kernels, draw):
    x, small = channels_last(draw(N, C, 2, 2)), torch.float8_e4m3fn
    message = "expected a floating-point type of 16, 32 or 64 bits"
    calls = [
        lambda: group_norm(x.to(small), 2),
        lambda: group_norm(x, 2, draw(C).to(torch.complex64)),
        lambda: attention(*(draw(N, 4, 1, C).to(small) for _ in range(3))),
        lambda: ddim_step(x, x.to(small), draw(N), draw(N, 1)),
        lambda: ddim_step(x, x, draw(N).int(), draw(N, 1)),
        lambda: diffuse(
            torch.zeros(N, 4, 4, 1, dtype=torch.uint8), draw(N), noise_key(0), torch.arange(N), None, small
        ),
    ]
    for call, mode in itertools.product(calls, ("reference", "triton")):
        with use(mode), pytest.raises(ValueError, match=message):
            call()


AUTOCAST = {
    "group_norm": lambda x, p: group_norm(x, 2, p[0], p[1], silu=True),
    "group_norm_attention": lambda x, p: group_norm_attention(x, 2, *p, 1),
    "attention": lambda x, p: attention(*3 * (x.permute(0, 2, 3, 1).flatten(1, 2)[:, :, None],)),
    "attention_packed": lambda x, p: attention_packed(p[2].view(1, C, 3, 1, C)),
    "ddim_step": lambda x, p: ddim_step(x, x, p[0][:N], p[4][:N, :1]),
}


@pytest.mark.parametrize("op", AUTOCAST)
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_autocast_changes_nothing(triton_kernels, draw, op, mode):
    x, shapes = leaf(channels_last(draw(N, C, 2, 2))), ((C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,))
    parameters = [draw(*shape) for shape in shapes]

    with use(mode):
        expected = AUTOCAST[op](x, parameters)
        with torch.autocast("cpu", torch.bfloat16):
            ours = AUTOCAST[op](x, parameters)
            assert (x.flatten(1) @ x.flatten(1).t()).dtype == torch.bfloat16  # as it was for the others
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)
        if ours.requires_grad:
            assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, expected)))


def test_autocast_in_compiled_code(triton_kernels, draw):
    x, weight = channels_last(draw(N, C, 2, 2)), draw(C)
    expected = group_norm(x, 2, weight, silu=True)
    for mode in ("triton", "reference"):
        torch.compiler.reset()
        compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
        with use(mode), torch.autocast("cpu", torch.bfloat16):
            assert_relative(compiled(x, 2, weight, silu=True), expected)


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 8, 6), (1, 8, 1, 1), (2, 8), (0, 8, 3, 4), (2, 8, 0, 4)])
def test_the_norm_lies_as_its_image(triton_kernels, draw, shape):
    """Contiguous, channels-last, and neither."""
    n, c, *rest = shape
    last = draw(n, *rest, c).movedim(-1, 1)
    apart = draw(n, *rest, 2 * c).movedim(-1, 1)[:, ::2]
    for x in (draw(*shape), last, apart):
        for mode in ("auto", "reference"):
            with use(mode):
                y = group_norm(x, 2)
            assert y.shape == x.shape
            if x is last:
                assert y.movedim(1, -1).is_contiguous()
    with use("triton"):
        assert group_norm(last, 2).movedim(1, -1).is_contiguous()


def test_gradients_of_coefficients_are_not_dropped(triton_kernels, draw):
    """The kernels have none: they refuse, and PyTorch computes it."""
    z, output, index = draw(3, 2, 4), draw(3, 2, 4), torch.tensor([1, 0, 1])
    for wanted in (0, 1):
        columns = [draw(2), draw(2, 1)]
        columns[wanted].requires_grad_()
        with pytest.raises(ValueError, match="ddim_step: it has no gradient with respect to the coefficients"):
            ddim_step(z, output, *columns, index)
        with torch.no_grad():
            ddim_step(z, output, *columns, index)
        with use("auto"):
            (gradient,) = torch.autograd.grad(ddim_step(z, output, *columns, index).sum(), columns[wanted])
        expected = [t.double().flatten(1).sum(1) for t in (z, output)][wanted]
        rows = torch.zeros(2, dtype=torch.float64).index_add(0, index, expected)
        assert_relative(gradient.flatten(), rows)


def test_no_elements(triton_kernels, draw):
    """Of a sample without elements the loss is a mean of nothing."""
    z, columns = draw(2, 3, 0, 4), (draw(2), draw(2, 1), draw(2, 1), draw(2, 1), draw(2))
    for mode in ("auto", "reference"):
        with use(mode):
            assert ddim_step_weighted_loss(z, z, z, z, *columns).isnan().all()
            assert ddim_step_weighted_loss(z[:0], z[:0], z[:0], z[:0], *(c[:0] for c in columns)).shape == (0,)
            assert ddim_step(z, z, *columns[:2]).shape == z.shape
            assert attention(*3 * (draw(2, 0, 1, 8),)).shape == (2, 0, 1, 8)
            assert attention(*3 * (draw(2, 4, 1, 0),)).shape == (2, 4, 1, 0)


OFFSETS = {
    "group_norm": lambda t: group_norm(channels_last(t(2, 8, 3, 3)), 2, t(8), t(8), scale=t(2, 8), silu=True),
    "attention": lambda t: attention(t(1, 4, 2, 8), t(1, 4, 2, 8), t(1, 4, 2, 8)),
    "ddim_step": lambda t: ddim_step(t(1, 3, 5, 5), t(1, 3, 5, 5), t(4), t(4, 1), torch.tensor([0, 3])[1:]),
    "loss": lambda t: ddim_step_weighted_loss(
        *(t(1, 3, 5, 5) for _ in range(4)), t(4), *(t(4, 1) for _ in range(3)), t(4), torch.tensor([0, 3])[1:]
    ),
}


@pytest.mark.parametrize("op", OFFSETS)
def test_a_storage_offset_of_one(triton_kernels, op):
    """Addresses that 16 bytes do not divide, of one sample."""

    def drawn(offset):
        generator = torch.Generator().manual_seed(0)

        def tensor(*shape):
            values = torch.randn(shape, generator=generator)
            storage = torch.cat([torch.full((offset,), torch.nan), values.flatten()])
            return storage[offset:].view(shape)

        return OFFSETS[op](tensor)

    assert torch.equal(drawn(1), drawn(0))
