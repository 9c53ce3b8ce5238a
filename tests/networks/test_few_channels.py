"""Convolutions from or to a few channels as products, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdfast.networks import few_channels
from pdfast.networks.layers import Conv2d


def tensors(inside, out, height=5, width=7):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, inside, height, width), (out, 3, 3, inside), (out,)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return [t.requires_grad_() for t in (x.contiguous(memory_format=torch.channels_last), weight, bias)]


def plain(x, weight, bias):
    return F.conv2d(x, weight.permute(0, 3, 1, 2), bias, padding=1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(("inside", "out"), [(3, 16), (1, 9), (16, 3), (16, 6), (4, 4), (9, 1)])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 2)])
def test_values_and_derivatives(inside, out, size):
    given = tensors(inside, out, *size)
    y, expected = few_channels.convolution(*given), plain(*given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(r, given, gradient) for r in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(few_channels.convolution, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(few_channels.convolution, given, fast_mode=True)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_one_of_its_gradients(frozen):
    given = tensors(16, 3)
    given[frozen].requires_grad_(False)
    wanted = [t for t in given if t.requires_grad]
    for one, other in zip(
        *(torch.autograd.grad(f(*given).sum(), wanted) for f in (few_channels.convolution, plain)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_where_it_is_wanted(monkeypatch):
    """In float32 on a GPU, of few channels, where no gradient is added up by atomics, and not in a larger graph."""

    def asked(inside, out, size=3, device="cuda", dtype=torch.float32, gradient=False):
        x = torch.empty(1, inside, 4, 4, device="meta", dtype=dtype, requires_grad=gradient)
        as_if = type(
            "x", (), {"device": torch.device(device), "dtype": dtype, "shape": x.shape, "requires_grad": gradient}
        )
        return few_channels.wanted(as_if, torch.empty(out, size, size, inside, device="meta"))

    assert asked(3, 128) and asked(128, 3, gradient=True) and asked(128, 6)
    assert not any((asked(3, 128, gradient=True), asked(128, 128), asked(3, 128, size=1), asked(3, 128, device="cpu")))
    assert not asked(3, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not asked(3, 128)


def test_the_layer_takes_it(monkeypatch):
    torch.manual_seed(0)
    layer, x = Conv2d(16, 3, 3), torch.randn(2, 16, 5, 5)
    nn.init.normal_(layer.bias)
    expected, calls = layer(x), []
    monkeypatch.setattr(few_channels, "wanted", lambda *given: calls.append(given) or True)
    torch.testing.assert_close(layer(x), expected)
    assert calls
