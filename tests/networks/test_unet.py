"""The U-Net: the authors' sizes, its parts against plain float64 implementations, and what others need of it."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pdfast.networks import NetworkConfig, UNet
from pdfast.networks.layers import Attention, Conv2d, ResBlock, time_embedding
from pdfast.plan.dry_run import activation_bytes, parameters_and_flops
from pdfast.recipes import PRESETS
from tests.commands import environment

TINY = NetworkConfig(8, 2, 8, (1, 2), 1, (4,), 8, 16, 4, "v")


def perturbed(module, seed=0):
    """Zero-initialised weights hide errors: give every parameter a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


@pytest.mark.parametrize(
    "name, parameters, gflop",
    [
        ("cifar10", 60_004_099, 35.8),  # counted from the authors' Flax code, as are the next two
        ("imagenet64", 295_905_222, 219.4),
        ("lsun128", 139_578_502, 133.6),
        ("cifar10-fast", 31_901_955, 14.2),
        ("digits", None, None),
    ],
)
def test_presets(name, parameters, gflop):
    counted, flops = parameters_and_flops(PRESETS[name].network)
    if parameters is None:
        assert 150_000 < counted < 500_000
    else:
        assert counted == parameters and round(flops / 1e9, 1) == gflop
    assert activation_bytes(PRESETS[name].network) > 0


def test_the_forward_keeps_to_its_contract():
    network = UNet(TINY)
    out = network(torch.randn(3, 2, 8, 8), torch.rand(3))
    assert out.shape == (3, 2, 8, 8) and out.dtype == torch.float32 and bool((out == 0).all())
    out = perturbed(network)(torch.randn(3, 2, 8, 8), torch.rand(3))
    assert out.is_contiguous(memory_format=torch.channels_last) and out.std() > 0


def test_both_has_twice_the_channels_and_classes_matter():
    network = perturbed(UNet(NetworkConfig(8, 2, 8, (1, 2), 1, (), 8, 16, 4, "both", num_classes=3)))
    z, phi = torch.randn(2, 2, 8, 8), torch.rand(2)
    a, b = (network(z, phi, torch.tensor(c)) for c in ([0, 1], [2, 1]))
    assert a.shape == (2, 4, 8, 8)
    assert not torch.allclose(a[0], b[0]) and torch.equal(a[1], b[1])


def test_dropout_only_in_training():
    network = perturbed(UNet(TINY, dropout=0.5))
    z, phi = torch.randn(2, 2, 8, 8), torch.rand(2)
    assert not torch.equal(network(z, phi), network(z, phi))
    network.eval()
    assert torch.equal(network(z, phi), network(z, phi))


def test_every_parameter_is_contiguous_and_gets_a_gradient():
    network = perturbed(UNet(TINY))
    network(torch.randn(2, 2, 8, 8), torch.rand(2)).square().mean().backward()
    for name, p in network.named_parameters():
        assert p.is_contiguous() and p.grad is not None and p.grad.abs().max() > 0, name


def test_time_embedding():
    phi = torch.tensor([0.0, 0.4, math.pi / 2])
    ours = time_embedding(phi, 8)
    for n, p in enumerate(phi.tolist()):
        for i in range(4):
            angle = 1000 * p / (math.pi / 2) * 10000 ** (-i / 3)
            assert (
                abs(float(ours[n, i]) - math.sin(angle)) < 1e-4 and abs(float(ours[n, 4 + i]) - math.cos(angle)) < 1e-4
            )


def test_conv_is_conv2d_of_its_weight():
    conv = perturbed(Conv2d(3, 5, 3)).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight.permute(0, 3, 1, 2).contiguous(), conv.bias, padding=1))


def plain_norm(x, norm):
    n, c = x.shape[:2]
    groups = x.reshape(n, norm.num_groups, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / torch.sqrt(groups.var(-1, correction=0, keepdim=True) + 1e-6)
    return groups.view(x.shape) * norm.weight.view(1, c, 1, 1) + norm.bias.view(1, c, 1, 1)


def silu(x):
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("resample", ["", "down", "up"])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_res_block(resample, out_channels):
    block = perturbed(ResBlock(8, out_channels, 6, 4, 0.0, resample)).double()
    x, emb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)

    def change(t):
        if resample == "down":
            return (t[..., ::2, ::2] + t[..., 1::2, ::2] + t[..., ::2, 1::2] + t[..., 1::2, 1::2]) / 4
        return t.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else t

    def conv(t, layer):
        return F.conv2d(t, layer.weight.permute(0, 3, 1, 2), layer.bias, padding="same")

    h = conv(change(silu(plain_norm(x, block.norm1))), block.conv1)
    film = emb @ block.film.weight.T + block.film.bias
    scale, shift = film[:, :out_channels, None, None], film[:, out_channels:, None, None]
    h = conv(silu(plain_norm(h, block.norm2) * (1 + scale) + shift), block.conv2)
    skip = change(x) if out_channels == 8 else conv(change(x), block.shortcut)
    torch.testing.assert_close(block(x, emb), skip + h)


def test_attention():
    block = perturbed(Attention(8, 4, 2)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = plain_norm(x, block.norm).flatten(2)  # [n, c, positions]
    q, k, v = (
        (torch.einsum("oc,ncp->nop", block.qkv.weight[i * 8 : i * 8 + 8], h) + block.qkv.bias[i * 8 : i * 8 + 8, None])
        .view(2, 2, 4, 15)
        for i in range(3)
    )  # fmt: skip
    weights = torch.softmax(torch.einsum("nhdp,nhdq->nhpq", q, k) / 2, -1)
    out = torch.einsum("nhpq,nhdq->nhdp", weights, v).reshape(2, 8, 15)
    out = torch.einsum("oc,ncp->nop", block.proj.weight, out) + block.proj.bias[:, None]
    torch.testing.assert_close(block(x), x + out.view(x.shape))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_size": 9}, "image_size 9"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_groups": 3}, "num_groups = 3"),
        ({"head_dim": 3}, "head_dim = 3"),
    ],
)
def test_impossible_shapes(change, words):
    with pytest.raises(ValueError, match=words):
        NetworkConfig(**{**TINY.__dict__, **change})


FULLY_SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from pdfast.networks import NetworkConfig, UNet

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
torch.manual_seed(0)
plain = UNet(NetworkConfig(8, 2, 8, (1, 2), 1, (4,), 8, 16, 4, "v"))
torch.nn.init.normal_(plain.conv_out.weight)
sharded = UNet(plain.config)
sharded.load_state_dict(plain.state_dict())
fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
z, phi = torch.randn(2, 2, 8, 8), torch.rand(2)
outs = [m(z, phi) for m in (plain, sharded)]
torch.testing.assert_close(*outs)
for out in outs:
    out.square().mean().backward()
for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(q.grad.full_tensor(), p.grad)
dist.destroy_process_group()
"""


def test_fully_shard_accepts_it():
    done = subprocess.run(
        [sys.executable, "-c", FULLY_SHARDED], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
