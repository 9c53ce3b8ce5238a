"""Models in which a replaced forward would compute something else: each gives the same with `accelerate` and without."""

import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from pdfast_kernels.integrate.accelerate import accelerate, restore
from tests.kernels.test_accelerate import inputs, shaken, smallest_unet


def assert_as_before(module, *arguments, call=None):
    """Its values after `accelerate`, and after `restore`."""
    call = call or module
    expected = call(*arguments)
    report = accelerate(module)
    torch.testing.assert_close(call(*arguments), expected, atol=1e-6, rtol=1e-5)
    restore(module)
    torch.testing.assert_close(call(*arguments), expected, atol=0, rtol=0)
    return report


def outputs_of(network):
    return lambda *arguments: network(*arguments, return_dict=False)[0]


def block():
    return shaken(ResnetBlock2D(in_channels=8, temb_channels=16, groups=4))


def pair():
    return shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU()))


def without_its_activation(self, sample, timestep, return_dict=True):
    """The end of a UNet with the norm alone, as in code that takes features."""
    return (self.conv_out(self.conv_norm_out(self.conv_in(sample))),)


def test_a_forward_on_the_instance_of_a_unet(draw):
    network = smallest_unet()
    network.forward = functools.partial(without_its_activation, network)
    report = assert_as_before(network, *inputs(draw, network), call=outputs_of(network))
    assert report.left == [("", "its forward was set by somebody else")]


def test_a_forward_set_later(draw):
    network = smallest_unet()
    arguments = inputs(draw, network)
    expected = without_its_activation(network, *arguments)[0]
    accelerate(network)
    network.forward = functools.partial(without_its_activation, network)
    assert torch.equal(network(*arguments)[0], expected)


class WithFeatures(UNet2DModel):
    """A method beside the forward, which uses a part of the end."""

    def features(self, sample):
        return self.conv_norm_out(self.conv_in(sample)), self.conv_act(self.conv_in(sample))


def test_the_parts_of_the_end_called_alone(draw):
    network = smallest_unet()
    network.__class__ = WithFeatures
    sample, timestep = inputs(draw, network)
    expected = network.features(sample)
    assert ("", "GroupNorm + SiLU at its end") in assert_as_before(
        network, sample, timestep, call=outputs_of(network)
    ).replaced
    accelerate(network)
    for ours, theirs in zip(network.features(sample), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for half in (network.conv_norm_out, network.conv_act):  # each by itself
        restore(half)
        torch.testing.assert_close(network.features(sample), expected)


def test_hooks_on_the_end_see_what_they_saw(draw):
    network, seen = smallest_unet(), []
    arguments = inputs(draw, network)
    accelerate(network)
    for part in (network.conv_norm_out, network.conv_act):
        part.register_forward_hook(lambda module, args, output: seen.append(output))
    ours = network(*arguments).sample
    restore(network)
    torch.testing.assert_close(ours, network(*arguments).sample)
    torch.testing.assert_close(seen[:2], seen[2:])


def test_global_hooks_see_what_they_saw(draw):
    network, seen = pair(), []
    x = draw(2, 4, 3, 3)
    expected = network(x)
    norm = network[1](network[0](x))
    accelerate(network)
    handle = register_module_forward_hook(lambda module, args, output: seen.append((type(module), output)))
    try:
        torch.testing.assert_close(network(x), expected)
    finally:
        handle.remove()
    assert [kind for kind, _ in seen] == [nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.Sequential]
    torch.testing.assert_close(seen[1][1], norm)


PATCHED = {
    "GroupNorm": (nn.GroupNorm, "forward", pair),
    "SiLU": (nn.SiLU, "forward", pair),
    "Sequential": (nn.Sequential, "forward", pair),
    "ResnetBlock2D": (ResnetBlock2D, "forward", block),
    "Attention": (Attention, "forward", lambda: Attention(16, heads=2, dim_head=8)),
    "AttnProcessor2_0": (AttnProcessor2_0, "__call__", lambda: Attention(16, heads=2, dim_head=8)),
    "UNet2DModel": (UNet2DModel, "forward", smallest_unet),
}


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "replaced"])
@pytest.mark.filterwarnings("ignore:accelerate replaced nothing")
@pytest.mark.parametrize("name", PATCHED)
def test_methods_that_somebody_put_into_a_class(monkeypatch, draw, name, wrapped):
    """With functools.wraps, the name, the module and the names that the original uses are still to be seen."""
    cls, method, build = PATCHED[name]
    module = build()
    original = getattr(cls, method)

    def doubled(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return 2 * result if isinstance(result, torch.Tensor) else (2 * result[0],)

    monkeypatch.setattr(cls, method, functools.wraps(original)(doubled) if wrapped else doubled)
    call = outputs_of(module) if name == "UNet2DModel" else module
    shapes = {pair: [(2, 4, 3, 3)], block: [(2, 8, 4, 4), (2, 16)]}.get(build, [(2, 5, 16)])
    arguments = inputs(draw, module) if name == "UNet2DModel" else [draw(*shape) for shape in shapes]
    report = assert_as_before(module, *arguments, call=call)
    if name != "SiLU":
        assert any("was replaced by somebody else's" in reason for _, reason in report.left)


class Lora(nn.Module):
    """A layer wrapped by another, as of peft, or by one with quantized weights."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, nn.Parameter(torch.full((16, 16), 0.1))

    def forward(self, x):
        return self.base(x) + x @ self.weight


class Saved(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, x):
        return self.original(x) + 1


class Squared(nn.Module):
    def forward(self, weight):
        return weight.square()


class Traced(nn.GroupNorm):
    def __call__(self, x):
        return super().__call__(x) + 1


def wrapped_layers():
    attention = shaken(Attention(16, heads=2, dim_head=8, norm_num_groups=4, bias=True))
    attention.to_q = Lora(attention.to_q)
    attention.to_out[0] = nn.utils.parametrizations.spectral_norm(attention.to_out[0]).eval()
    attention.group_norm = Saved(attention.group_norm)
    return attention, (2, 5, 16)


def parametrized():
    network = pair()
    parametrize.register_parametrization(network[1], "weight", Squared())
    network[0] = nn.utils.parametrizations.weight_norm(network[0])
    return network, (2, 4, 3, 3)


def shared():
    norm, silu = nn.GroupNorm(2, 4), nn.SiLU()
    return shaken(nn.Sequential(nn.Sequential(norm, silu), nn.Sequential(silu, norm), norm, silu)), (2, 4, 3, 3)


def called_otherwise():
    return shaken(nn.Sequential(Traced(2, 4), nn.SiLU())), (2, 4, 3, 3)


def compiled():
    network = pair()
    network[1].compile(backend="eager")
    network(torch.zeros(2, 4, 3, 3))
    return torch.compile(network, backend="eager"), (2, 4, 3, 3)


@pytest.mark.parametrize("build", [wrapped_layers, parametrized, shared, called_otherwise, compiled])
def test_layers_that_are_wrapped_or_shared(draw, build):
    module, shape = build()
    assert_as_before(module.eval(), draw(*shape))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transforms_take_it_as_they_took_it(draw):
    network, x = pair(), draw(3, 2, 4, 3, 3)
    parameters = dict(network.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(network, parameters, (x,)).square().mean()

    def results():
        yield torch.func.vmap(network)(x)
        yield from torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values()
        yield torch.fx.symbolic_trace(network)(x[0])
        yield torch.export.export(network, (x[0],)).module()(x[0])

    before = list(results())
    accelerate(network)
    for ours, theirs in zip(results(), before, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(Exception, match=r"before torch.jit.script: pdfast_kernels.restore\(model\)"):
        torch.jit.script(network)


class Guided(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Fp32(nn.GroupNorm):
    """As in fairseq."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = F.group_norm(
            input.float(),
            self.num_groups,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        )
        return output.type_as(input)


class Inherited(Guided):
    pass


class Swish(nn.GroupNorm):
    def __init__(self, *args, swish=0.0):
        super().__init__(*args)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x.float()).to(x.dtype)
        return F.silu(y) if self.swish == 1.0 else y


class Widened(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float())


class Narrowed(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.to(torch.bfloat16)).type(x.dtype)


class Twice(nn.GroupNorm):
    def forward(self, x):
        return super().forward(super().forward(x))


class Shifted(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [Guided, Fp32, Inherited])
def test_group_norms_that_only_cast_are_taken(draw, cls, dtype):
    for affine in (True, False):
        norm = cls(2, 4, affine=affine)
        network = shaken(nn.Sequential(norm, nn.SiLU()))
        x = draw(2, 4, 3, 3).to(dtype)
        expected = network(x)
        report = accelerate(network)
        assert report.replaced == [("0", "GroupNorm"), ("", "GroupNorm + SiLU")] and not report.left
        ours = network(x)
        assert ours.dtype == expected.dtype == dtype
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("cls", [Swish, Widened, Narrowed, Twice, Shifted])
def test_group_norms_that_do_more_are_left(cls):
    with pytest.warns(UserWarning, match="accelerate replaced nothing"):
        report = accelerate(cls(2, 4))
    ((name, reason),) = report.left
    assert name == "" and reason.startswith(f"{cls.__name__} has a forward of its own")


def test_another_default_device_changes_nothing():
    norm = Guided(2, 4)
    with torch.device("meta"):
        assert accelerate(norm).replaced == [("", "GroupNorm")]
