"""What the report of `accelerate` says of the work that runs kernels, and of the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdfast_kernels import attention, use
from pdfast_kernels.integrate.accelerate import accelerate


def nonlinearity(x):
    return x * torch.sigmoid(x)


class Block(nn.Module):
    """As in latent diffusion: a module for the norm, a function for what comes after it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        return nonlinearity(self.norm(x))


class Attending(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens


class OurAttention(nn.Module):
    def forward(self, x):
        tokens = x[:, :, None]
        return F.scaled_dot_product_attention(x, x, x) + attention(tokens, tokens, tokens).squeeze(2)


def model():
    return nn.Sequential(
        nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout()),
        Block(),
        Attending(),
        nn.LayerNorm(4),
        OurAttention(),
    )


def test_without_an_example_modules_are_counted():
    report = accelerate(model())
    lines = str(report).splitlines()
    assert lines[0] == "3 modules replaced, 0 left, 0 ran kernels before, 4 not understood"
    assert lines[1:4] == [
        "norm: 2 of 3 modules, 67%",
        "activation: 1 of 2 modules, 50%",
        "attention: 0 of 2 modules, 0%",
    ]
    assert lines[-5:] == [
        "not understood:",
        "      1 x Block (sigmoid), as 1",
        "      1 x Attending (softmax), as 2",
        "      1 x LayerNorm, as 3",
        "      1 x OurAttention (scaled_dot_product_attention), as 4",
    ]


def test_with_an_example_the_elements_are_counted():
    network = model().train()
    training = [part.training for part in network.modules()]
    x, parameters = torch.ones(2, 4, 3, 3), [p.clone() for p in network.parameters()]
    report = accelerate(network, example=(x,))
    elements, scores = 2 * 4 * 9, 2 * 9 * 9
    assert report.shares["norm"] == (2 * elements, 3 * elements, "elements")
    assert report.shares["activation"] == (elements, 2 * elements, "elements")
    assert report.shares["attention"] == (scores, 3 * scores, "scores")
    assert "attention: 162 of 486 scores, 33%" in str(report).splitlines()
    assert [part.training for part in network.modules()] == training
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(network.parameters(), parameters, strict=True))
    assert accelerate(network, example={"input": x}).shares == report.shares


def test_where_nothing_is_replaced_a_warning_says_what_is_there():
    with pytest.warns(UserWarning, match="nothing in Sequential: not understood: 2 x LayerNorm, 1 x GELU$"):
        report = accelerate(nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.LayerNorm(4)))
    assert report.shares["norm"] == (0, 2, "modules") and len(report.unknown) == 3
    with pytest.warns(UserWarning, match="nothing in Linear: it has no norm, activation or attention"):
        accelerate(nn.Linear(1, 1))
    scripted = nn.Sequential(nn.GroupNorm(2, 4))
    scripted[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="nothing in Sequential: 1 left with a reason, which its report has"):
        accelerate(scripted)


def test_the_kernels_refuse_vmap_by_name(draw, triton_kernels):
    norm = nn.GroupNorm(2, 4)
    accelerate(norm)
    x = draw(3, 2, 4, 3, 3)
    with pytest.raises(ValueError, match="do not run under torch.func.vmap"):
        torch.func.vmap(norm)(x)
    with use("reference"):
        torch.testing.assert_close(torch.func.vmap(norm)(x), torch.stack([norm(each) for each in x]))
