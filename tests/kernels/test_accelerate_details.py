"""What trained models set away from diffusers' defaults, seen by values."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from pdfast_kernels.integrate.accelerate import accelerate
from tests.kernels.test_accelerate import inputs, smallest_unet


def assert_same(module, *arguments):
    torch.manual_seed(0)  # for dropout
    expected = module(*arguments)
    accelerate(module)
    torch.manual_seed(0)
    assert torch.allclose(module(*arguments), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["default", "scale_shift"])
@pytest.mark.parametrize("changes", [{"output_scale_factor": 2.0}, {"skip_time_act": True}, {"eps": 0.1}], ids=str)
def test_blocks(draw, mode, changes):
    block = ResnetBlock2D(in_channels=8, temb_channels=16, groups=4, time_embedding_norm=mode, **changes)
    assert_same(block, draw(2, 8, 4, 4), draw(2, 16))


def test_the_dropout_of_attention(draw):
    assert_same(Attention(16, heads=2, dim_head=8, dropout=0.5).train(), draw(2, 5, 16))


def test_the_end_has_its_own_eps(draw):
    network = smallest_unet()
    network.conv_norm_out.eps = 0.5
    arguments = inputs(draw, network)
    expected = network(*arguments).sample
    accelerate(network)
    assert torch.allclose(network(*arguments).sample, expected, atol=1e-5)


class Doubled:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, offset=0):
        return 2 * hidden_states + offset


def test_a_processor_set_later(draw):
    block, x = Attention(16, heads=2, dim_head=8), draw(2, 5, 16)
    accelerate(block)
    block.set_processor(Doubled())
    assert torch.equal(block(x), 2 * x) and torch.equal(block(x, offset=1), 2 * x + 1)


def test_arguments_of_diffusers_go_to_diffusers(draw):
    block = ResnetBlock2D(in_channels=8, temb_channels=16, groups=4)
    accelerate(block)
    with pytest.raises(Exception, match="scale"):  # diffusers' own deprecation, a warning that is an error here
        block(draw(2, 8, 4, 4), draw(2, 16), scale=1.0)
