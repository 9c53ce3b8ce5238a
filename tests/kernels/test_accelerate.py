"""`accelerate` on diffusers' networks: what they compute, and what else is done with them."""

import copy
import io

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from pdfast_kernels.integrate import forwards
from pdfast_kernels.integrate.accelerate import accelerate, restore
from pdfast_kernels.ops.group_norm.group_norm import group_norm
from tests.kernels.compare import channels_last

# How many times PyTorch's error one tensor may have, and what of the largest value besides: which of two small errors is
# larger, is luck, and another luck on another CPU or with another layout. In bf16 that is so of a gradient that went through
# a whole network, but not of the mean over all.
TIMES, FLOOR = {torch.float32: 2, torch.bfloat16: 4}, {torch.float32: 2e-6, torch.bfloat16: 2**-6}
TIMES_IN_THE_MEAN = 1.5
SMALL = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}


def shaken(module):
    """Parameters of the size that trained ones have: none zero or one, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise / 4 + name.endswith("weight"))
    return module


def unet(mode="default", **changes):
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "resnet_time_scale_shift": mode,
    }
    return shaken(UNet2DModel(**SMALL | config | changes))


def smallest_unet(mode="default"):
    """Attention, and both kinds of blocks."""
    types = {"down_block_types": ("DownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return unet(mode, block_out_channels=(8,), mid_block_type=None, **types)


def conditional_unet():
    types = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return shaken(UNet2DConditionModel(block_out_channels=(8, 16), cross_attention_dim=16, **SMALL | types))


NETWORKS = {
    "default": unet,
    "scale_shift": lambda: unet("scale_shift"),
    "resampling": lambda: unet("scale_shift", downsample_type="resnet", upsample_type="resnet"),
    "conditional": conditional_unet,
}


def inputs(draw, network):
    x, timesteps = draw(2, network.config.in_channels, 8, 8), torch.tensor([3, 500])
    return (x, timesteps, draw(2, 5, 16)) if isinstance(network, UNet2DConditionModel) else (x, timesteps)


def run(network, arguments, dtype=torch.float32):
    """Output, and the gradients of the input and of all parameters."""
    x, *others = (a.to(dtype) if a.is_floating_point() else a for a in arguments)
    x = x.detach().requires_grad_()
    y = network(x, *others).sample
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *network.parameters()], gradient)]


def assert_as_accurate(ours, theirs, exact):
    relative = []
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        size = reference.abs().max().clamp(min=1)
        error, allowed = ((tensor.double() - reference).abs().max() / size for tensor in (one, other))
        assert error <= TIMES[one.dtype] * allowed + FLOOR[one.dtype]
        relative.append(torch.stack([error, allowed]))
    error, allowed = torch.stack(relative).mean(0)
    assert error <= TIMES_IN_THE_MEAN * allowed + FLOOR[torch.float32]


def assert_equal(ours, theirs):
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def set_forwards(module):
    return {name for name, part in module.named_modules() if "forward" in part.__dict__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lay_out", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients(draw, name, lay_out, dtype):
    network = NETWORKS[name]().to(dtype)
    x, *others = inputs(draw, network)
    arguments, keys = (lay_out(x.to(dtype)), *others), list(network.state_dict())
    exact = run(copy.deepcopy(network).double(), arguments, torch.float64)
    theirs = run(network, arguments, dtype)
    report = accelerate(network)
    assert {name for name, _ in report.replaced} == set_forwards(network)
    assert_as_accurate(run(network, arguments, dtype), theirs, exact)
    assert list(network.state_dict()) == keys
    restore(network)
    assert not set_forwards(network)
    assert_equal(run(network, arguments, dtype), theirs)


@pytest.mark.parametrize("mode", ["default", "scale_shift"])
def test_all_of_a_channels_last_network_is_in_reach_of_the_kernels(draw, triton_kernels, mode):
    network = smallest_unet(mode).to(memory_format=torch.channels_last)
    arguments = inputs(draw, network)
    exact = run(copy.deepcopy(network).double(), arguments, torch.float64)
    theirs = run(network, arguments)
    accelerate(network)
    assert_as_accurate(run(network, arguments), theirs, exact)  # raises where PyTorch would run


@pytest.mark.parametrize("mode", ["default", "scale_shift"])
def test_what_runs_as_one(monkeypatch, draw, mode):
    calls = []

    def counted(*args, scale=None, shift=None, silu=False):
        calls.append((scale is not None, silu))
        return group_norm(*args, scale=scale, shift=shift, silu=silu)

    monkeypatch.setattr(forwards, "group_norm", counted)
    network = unet(mode)
    report = accelerate(network)
    blocks = sum(kind == forwards.ResnetBlock2D.kind for _, kind in report.replaced)
    norms = sum(isinstance(part, nn.GroupNorm) for part in network.modules())
    network(*inputs(draw, network))
    assert len(calls) == norms and sum(silu for _, silu in calls) == 2 * blocks + 1
    assert sum(film for film, _ in calls) == (blocks if mode == "scale_shift" else 0)


def test_copies_have_parameters_of_their_own(draw):
    network = smallest_unet()
    arguments = inputs(draw, network)
    accelerate(network)
    before = run(network, arguments)
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin(*arguments).sample.abs().max() == 0
    assert_equal(run(network, arguments), before)
    twin.load_state_dict(network.state_dict())
    assert_equal(run(twin, arguments), before)
    in_float64 = run(twin.double(), arguments, torch.float64)
    for one, other in zip(in_float64, run(restored(twin), arguments, torch.float64), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)

    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert accelerate(loaded) == accelerate(restored(network))
    assert_equal(run(loaded, arguments), before)


def restored(network):
    restore(network)
    return network


def test_what_is_done_with_networks(draw):
    network = unet("scale_shift", dropout=0.3)
    arguments = inputs(draw, network)
    others = {name: 2 * parameter for name, parameter in network.named_parameters()}

    def results():
        torch.manual_seed(0)
        yield from run(network.train(), arguments)
        yield torch.func.functional_call(network, others, arguments).sample
        yield network.eval()(*arguments, return_dict=False)[0]
        network.train().enable_gradient_checkpointing()
        yield from run(network, arguments)
        network.disable_gradient_checkpointing()

    before = list(results())
    accelerate(network)
    for ours, theirs in zip(results(), before, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1)


def test_compile(draw):
    network = smallest_unet("scale_shift")
    arguments = inputs(draw, network)
    exact = run(copy.deepcopy(network).double(), arguments, torch.float64)
    theirs = run(network, arguments)
    accelerate(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert_as_accurate(run(compiled, arguments), theirs, exact)
