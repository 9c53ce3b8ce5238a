"""The linear operations against einsum in float64, and their gradients."""

import pytest
import torch

from pdfast_kernels import ddim_step, ddim_step_weighted_loss, ddim_step_weighted_loss_and_grad, weighted_loss

N, C, H, W = 3, 2, 4, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("P", [1, 2])
def test_linear_operations(P):
    z, o1, o2, o = draw(N, C, H, W), *(draw(N, P * C, H, W, seed=s) for s in (1, 2, 3))
    a, b1, b2, b = draw(N, seed=4), *(draw(N, P, seed=s) for s in (5, 6, 7))
    weight = draw(N, seed=8).abs()

    def parts(output):
        return output.view(N, P, C, H, W)

    step = torch.einsum("n,nchw->nchw", a, z) + torch.einsum("np,npchw->nchw", b1, parts(o1))
    torch.testing.assert_close(ddim_step(z, o1, a, b1), step)
    target = step + torch.einsum("np,npchw->nchw", b2, parts(o2))
    error = torch.einsum("np,npchw->nchw", b, parts(o)) - target
    expected = weight * error.square().mean((1, 2, 3))
    torch.testing.assert_close(ddim_step_weighted_loss(o, z, o1, o2, a, b1, b2, b, weight), expected)
    torch.testing.assert_close(weighted_loss(o, target, b, weight), expected)


@pytest.mark.parametrize("P", [1, 2])
def test_gradients(P):
    z, o1, o2 = draw(N, C, 2, 2), draw(N, P * C, 2, 2, seed=1), draw(N, P * C, 2, 2, seed=2)
    o = draw(N, P * C, 2, 2, seed=3).requires_grad_()
    a, b1, b2, b, weight = draw(N), draw(N, P), draw(N, P), draw(N, P), draw(N).abs()
    assert torch.autograd.gradcheck(lambda o: ddim_step_weighted_loss(o, z, o1, o2, a, b1, b2, b, weight), (o,))
    assert torch.autograd.gradcheck(lambda o: weighted_loss(o, z, b, weight), (o,))


def test_other_shapes_than_images():
    z, o = draw(N, 7), draw(N, 7, seed=1)
    a, b = draw(N, seed=2), draw(N, 1, seed=3)
    torch.testing.assert_close(ddim_step(z, o, a, b), a[:, None] * z + b * o)


@pytest.mark.parametrize("coefficients", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_state_of_16_bits_does_not_round_the_target(dtype, coefficients):
    z, o1, o2, o = (draw(N, C, H, W, seed=s).to(dtype) for s in range(4))
    columns = [column.to(coefficients) for column in (draw(N), draw(N, 1), draw(N, 1), draw(N, 1), draw(N).abs())]
    exact = ddim_step_weighted_loss(*(t.double() for t in (o, z, o1, o2, *columns)))
    ours = ddim_step_weighted_loss(o, z, o1, o2, *columns)
    and_grad, _ = ddim_step_weighted_loss_and_grad(o, z, o1, o2, *columns, grad_scale=1.0)
    for losses in (ours, and_grad):
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    step = ddim_step(z, o1, columns[0], columns[1])
    exact = ddim_step(z.double(), o1.double(), columns[0].double(), columns[1].double())
    assert step.dtype == dtype
    torch.testing.assert_close(step, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)
