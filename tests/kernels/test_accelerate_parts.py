"""What `accelerate` recognises, what it leaves, and what it says of that."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pdfast.networks import NetworkConfig, UNet
from pdfast_kernels.integrate.accelerate import accelerate, restore
from pdfast_kernels.integrate.recognition import unknown_version
from pdfast_kernels.ops.group_norm.group_norm import group_norm
from tests.kernels.test_accelerate import conditional_unet, shaken, smallest_unet


def test_the_report():
    network = conditional_unet()
    report = accelerate(network)
    assert ("mid_block.resnets.0", "ResnetBlock2D: GroupNorm (+ FiLM) + SiLU") in report.replaced
    assert ("mid_block.attentions.0.norm", "GroupNorm") in report.replaced
    reason = "cross attention: its keys and values are of another tensor"
    assert {text for _, text in report.left} == {reason} and len(report.left) == 4
    assert ("", "GroupNorm + SiLU at its end") in report.replaced
    assert str(report).splitlines()[0] == "34 modules replaced, 4 left, 0 ran kernels before, 21 not understood"
    assert "      2 x up_blocks.*.attentions.*.transformer_blocks.*.attn2: " + reason in str(report).splitlines()
    again = accelerate(network)
    assert not again.replaced and again.left == report.left and sorted(again.already) == sorted(report.replaced)
    assert again.shares == report.shares and again.unknown == report.unknown
    assert str(accelerate(nn.GroupNorm(1, 2))).splitlines()[-2:] == ["replaced:", "      1 x (itself): GroupNorm"]


def test_a_sequential(draw):
    silu = nn.SiLU()
    network = shaken(nn.Sequential(nn.GroupNorm(2, 4), silu, nn.Conv2d(4, 4, 1), silu, nn.GroupNorm(4, 4), nn.SiLU()))
    x = draw(2, 4, 3, 3)
    norm, rest = network[0], network[1:]
    expected, parts = network(x), rest(norm(x) * 3 + 1)
    report = accelerate(network)
    assert ("", "GroupNorm + SiLU") in report.replaced and not report.left
    assert torch.allclose(network(x), expected, atol=1e-6)
    # As in guided-diffusion, which puts FiLM between the two.
    assert torch.allclose(network[1:](norm(x) * 3 + 1), parts, atol=1e-6)
    assert silu(torch.ones(())) == F.silu(torch.ones(()))


class Doubling(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def left(module):
    """What is left where nothing is replaced."""
    with pytest.warns(UserWarning, match=f"accelerate replaced nothing in {type(module).__name__}"):
        report = accelerate(module)
    assert not report.replaced
    return report.left


def test_what_is_left(draw):
    own = nn.Sequential(Doubling(2, 4), nn.SiLU())
    reason = "GroupNorm and SiLU stay apart: one has a forward of its own"
    assert left(own) == [("0", "Doubling has a forward of its own"), ("", reason)]
    set_by_others = nn.GroupNorm(2, 4)
    set_by_others.forward = lambda x: x
    assert left(set_by_others) == [("", "its forward was set by somebody else")]
    restore(set_by_others)
    assert set_by_others(1) == 1
    assert not accelerate(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())).left

    class Newer(ResnetBlock2D):
        def forward(self, input_tensor, temb):
            return self.norm1(self.something_new(input_tensor))

    Newer.__module__, Newer.__qualname__ = ResnetBlock2D.__module__, ResnetBlock2D.__qualname__
    assert accelerate(Newer(in_channels=32)).left == [("", "Newer.forward was replaced by somebody else's")]
    assert unknown_version(Doubling, "forward", "super").endswith(
        "Doubling.forward is of an unknown version: it uses forward"
    )
    assert "Mish, not SiLU" in accelerate(ResnetBlock2D(in_channels=32, non_linearity="mish")).left[0][1]

    others = {
        "it has norm_q": Attention(16, qk_norm="layer_norm"),
        "its processor is AttnProcessor, not AttnProcessor2_0": Attention(16, processor=AttnProcessor()),
        "it has other projections than to_q, to_k, to_v and to_out of one size": Attention(16, heads=4, kv_heads=2),
    }
    for reason, block in others.items():
        assert left(block) == [("", reason)]


def test_hooks_see_what_they_saw(draw):
    block = shaken(ResnetBlock2D(in_channels=8, temb_channels=16, groups=4))
    fused = copy.deepcopy(block)
    x, temb = draw(2, 8, 4, 4), draw(2, 16)
    seen = []
    for part in (block.norm1, block.nonlinearity):
        part.register_forward_hook(lambda module, args, output: seen.append(output))
    block(x, temb)
    report = accelerate(block)
    assert report.left == [("", "GroupNorm and SiLU stay apart: one has hooks, which would see another tensor")]
    block(x, temb)

    assert not accelerate(fused).left
    for part in (fused.norm1, fused.nonlinearity):  # too late to be left, and still not wrong
        part.register_forward_hook(lambda module, args, output: seen.append(output))
    fused(x, temb)
    assert len(seen) == 12
    for before, left, late in zip(seen[:4], seen[4:8], seen[8:], strict=True):
        assert torch.allclose(before, left, atol=1e-6) and torch.allclose(before, late, atol=1e-6)

    network = smallest_unet()
    network.conv_act.register_forward_hook(lambda module, args, output: None)
    assert accelerate(network).left == [("", report.left[0][1])]


def test_attention_with_a_mask_or_another_processor(draw):
    block = shaken(Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True))
    x, context = draw(2, 5, 16), draw(2, 3, 16)
    mask = torch.tensor([0.0, 0.0, -1e4, 0.0, 0.0]).expand(2, 1, 5)

    def results():
        for processor in (AttnProcessor(), AttnProcessor2_0()):
            block.set_processor(processor)
            yield from (block(x), block(x, attention_mask=mask), block(x, context))

    before = list(results())
    assert accelerate(block).replaced[-1] == ("", "self-attention")
    assert all(torch.allclose(*both, atol=1e-6) for both in zip(results(), before, strict=True))


class CallsTheKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        return group_norm(x, 2, self.norm.weight, self.norm.bias, silu=True)


def test_our_own(draw):
    assert accelerate(CallsTheKernels()).already == [("", "calls pdfast_kernels itself")]
    network = shaken(UNet(NetworkConfig(8, 3, 8, (1, 2), 1, (4,), 8, 16, 4, "v")))
    x, phi = draw(2, 3, 8, 8), torch.tensor([0.1, 1.5])
    expected = network(x, phi)
    report = accelerate(network)
    assert not report.left and ("norm_out", "calls pdfast_kernels itself") in report.already
    assert torch.equal(network(x, phi), expected)
