"""The linear operations against einsum in float64, and their gradients."""

import pytest
import torch

from pdfast_kernels import ddim_step, ddim_step_weighted_loss, diffuse, weighted_loss

N, C, H, W = 3, 2, 4, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_diffuse():
    images = torch.randint(0, 256, (N, H, W, C), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    phi, noise = torch.tensor([0.0, 0.7, 1.5]).double(), draw(N, C, H, W)
    flip = torch.tensor([True, False, True])
    z = diffuse(images, phi, noise, flip)
    for n in range(N):
        x = images[n].double() / 127.5 - 1
        x = torch.flip(x, [1]) if flip[n] else x
        expected = torch.cos(phi[n]) * x.permute(2, 0, 1) + torch.sin(phi[n]) * noise[n]
        torch.testing.assert_close(z[n], expected)


def test_diffuse_is_channels_last_and_keeps_the_noises_dtype():
    noise = torch.randn(N, H, W, C).permute(0, 3, 1, 2)
    z = diffuse(torch.zeros(N, H, W, C, dtype=torch.uint8), torch.zeros(N), noise)
    assert z.dtype == torch.float32 and z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, torch.full_like(z, -1))


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
