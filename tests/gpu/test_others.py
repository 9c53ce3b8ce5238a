"""What has no gradient, what has a state, and what is larger than 32 bits can count."""

import math

import pytest
import torch

from pdfast.networks import few_channels
from pdfast_kernels import AdamEma, ddim_step, diffuse, group_norm, noise_key, reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flipped", [False, True])
def test_diffuse_draws_the_cpus_noise(dtype, flipped):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=generator)
    phi, index = torch.linspace(0, math.pi / 2, 9), torch.arange(9) + 2**32 - 9
    flip = torch.arange(9) % 2 == 0 if flipped else None
    key = noise_key(2**63 + 5, 1, 3, 7)
    cpu = reference.diffuse(images, phi, key, index, flip)
    gpu = diffuse(*(None if t is None else t.cuda() for t in (images, phi, key, index, flip)), dtype)
    tolerance = 4e-6 if dtype == torch.float32 else 2**-8 * cpu.abs().max()  # the CPU's angle is of float32
    assert (gpu.cpu().float() - cpu).abs().max() <= tolerance


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_adam_ema_is_adamw(draw, averaged, twice):
    """The second averages lie at addresses that 16 bytes do not divide."""
    sizes = [(256, 256), (3, 3, 64, 64), (7,), (1,), (4097,)]
    parameters = [draw(*size) for size in sizes]
    zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    averages = [p.clone() for p in parameters] if averaged else None
    second_averages = [torch.cat([p.view(-1)[:1], p.view(-1)])[1:].view(p.shape) for p in parameters] if twice else None
    theirs = [p.double().requires_grad_() for p in parameters]
    adam = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    ours = AdamEma(parameters, *zeros, averages, weight_decay=0.1, second_averages=second_averages)
    expected, second_expected = ([p.detach().clone() for p in theirs] for _ in range(2))
    for step in range(1, 6):
        gradients = [draw(*size) for size in sizes]
        ours.step(gradients, torch.tensor([1e-2, step, 0.5, 0.1, 0.0, 0.5], device="cuda"))
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = 0.5 * g.double()
        adam.step()
        torch._foreach_lerp_(expected, [p.detach() for p in theirs], 0.1)
        torch._foreach_lerp_(second_expected, [p.detach() for p in theirs], 0.5)
    for one, other in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=1e-5, atol=1e-6)
    for ours_averaged, exact in ((averages, expected), (second_averages, second_expected)):
        for one, other in zip(ours_averaged or [], exact, strict=ours_averaged is not None):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_adam_ema_skips_on_the_device(draw):
    parameters = [draw(1000)]
    ours = AdamEma(parameters, [torch.zeros(1000, device="cuda")], [torch.zeros(1000, device="cuda")])
    before = parameters[0].clone()
    ours.step([draw(1000)], torch.tensor([1e-2, 1, 1, 0, float("nan")], device="cuda"))
    assert torch.equal(parameters[0], before)


@pytest.mark.parametrize(("inside", "out"), [(3, 128), (128, 3), (192, 6)])
def test_the_ends_of_a_network_as_products(draw, inside, out):
    """As near to float64 as float32 can be, and the same bits in every run."""
    x = draw(4, inside, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_(out <= 8)
    weight, bias, gradient = draw(out, 3, 3, inside).requires_grad_(), draw(out), draw(4, out, 32, 32)
    wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
    assert few_channels.wanted(x, weight)
    runs = [few_channels.convolution(x, weight, bias) for _ in range(2)]
    first, second = ([y, *torch.autograd.grad(y, wanted, gradient)] for y in runs)
    exact = torch.conv2d(x.double(), weight.double().permute(0, 3, 1, 2), bias.double(), padding=1)
    for one, other, expected in zip(
        first, second, [exact, *torch.autograd.grad(exact, wanted, gradient.double())], strict=True
    ):
        assert torch.equal(one, other) and (one - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_group_norm_of_more_than_2_31_elements():
    """The last sample lies beyond 2^31 elements: it is as it would be alone."""
    shape = (129, 256, 256, 256)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x[-1].normal_(3, 2)
    x[:-1].zero_()
    assert x.numel() > 2**31
    y = group_norm(x, 32, silu=True)
    assert torch.equal(y[-1:], group_norm(x[-1:].contiguous(memory_format=torch.channels_last), 32, silu=True))


def test_ddim_step_of_more_than_2_31_elements():
    z = torch.ones(2, 1 << 30, 2, dtype=torch.bfloat16, device="cuda").view(2, 2, 1 << 30)
    a, b = torch.tensor([0.5, 0.25], device="cuda"), torch.tensor([[0.25], [0.5]], device="cuda")
    step = ddim_step(z, z, a, b)
    assert z.numel() > 2**31 and bool((step == 0.75).all())
