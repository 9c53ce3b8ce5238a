"""`diffuse` in Triton's interpreter against Box-Muller and the mixture in float64, on the integers of `philox`."""

import math

import numpy as np
import pytest
import torch

from pdfast_kernels import use
from pdfast_kernels.ops.diffuse.diffuse import _normal_pair, diffuse, noise_key, philox4x32
from pdfast_kernels.random import philox
from pdfast_kernels.runtime.triton import jit, tl
from tests.kernels.compare import RELATIVE, assert_relative

KEY = (2**63 + 12345, 65535, 3, 2**32 - 1)
INDEX = [2**32 - 1, 0, 77]
SHAPES = [(3, 8, 8, 3), (2, 5, 7, 1), (1, 20, 20, 3), (1, 1, 1, 1), (0, 8, 8, 3), (2, 3, 3, 4), (1, 24, 32, 3)]


def expected_noise(key, index, shape):
    """[N, H, W, C] in float64, of the float32 number whose logarithm the radius is."""
    words = philox.integers(*key, index, 4 * -(-math.prod(shape) // 4)).numpy()
    words = words.reshape(len(index), words.shape[1] // 2, 2)
    uniform = (words[..., 0].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    angle = words[..., 1] * (2 * math.pi / 2**32)
    radius = np.sqrt(-2 * np.log(uniform))
    eps = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(len(index), 2 * words.shape[1])
    return torch.from_numpy(eps[:, : math.prod(shape)].copy()).reshape(len(index), *shape)


def expected_mixture(images, phi, key, index, flip):
    x = images.numpy() / 127.5 - 1
    if flip is not None:
        x[flip.numpy()] = x[flip.numpy(), :, ::-1]
    angle = phi.double()[:, None, None, None]
    z = torch.cos(angle) * torch.from_numpy(x) + torch.sin(angle) * expected_noise(key, index, images.shape[1:])
    return z.permute(0, 3, 1, 2)


def draw_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values(triton_kernels, shape, flipped, dtype):
    n = shape[0]
    images, phi, index = draw_images(*shape), torch.tensor([1.1, 0.3, 1.5])[:n], torch.tensor(INDEX)[:n]
    flip = torch.tensor([True, False, True])[:n] if flipped else None
    z = diffuse(images, phi, noise_key(*KEY), index, flip, dtype)
    assert z.dtype == dtype and z.is_contiguous(memory_format=torch.channels_last)
    assert_relative(z, expected_mixture(images, phi, KEY, index, flip), RELATIVE[dtype])
    with use("reference"):
        reference = diffuse(images, phi, noise_key(*KEY), index, flip, dtype)
    assert reference.dtype == dtype and reference.is_contiguous(memory_format=torch.channels_last)
    assert_relative(reference, expected_mixture(images, phi, KEY, index, flip), RELATIVE[dtype])


@jit
def integers(counter_ptr, key_ptr, words_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1 = tl.load(counter_ptr + i).to(tl.uint32), tl.load(counter_ptr + N + i).to(tl.uint32)
    c2, c3 = tl.load(counter_ptr + 2 * N + i).to(tl.uint32), tl.load(counter_ptr + 3 * N + i).to(tl.uint32)
    words = philox4x32(c0, c1, c2, c3, tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32))
    for j in tl.static_range(4):
        tl.store(words_ptr + j * N + i, words[j].to(tl.int64))


def test_integers_are_those_of_philox(triton_kernels):
    counter = torch.randint(0, 2**32, (4, 64), generator=torch.Generator().manual_seed(2))
    counter[:, 0], counter[:, 1] = 2**32 - 1, 0
    for key in [(0, 0), (2**32 - 1, 2**32 - 1), (0xA4093822, 0x299F31D0)]:
        words = torch.empty(4, 64, dtype=torch.int64)
        integers[(1,)](counter, torch.tensor(key), words, N=64)
        assert torch.equal(words, torch.stack(philox.philox4x32(tuple(counter), key)))


@jit
def pairs(radius_ptr, angle_ptr, pairs_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = _normal_pair(tl.load(radius_ptr + i).to(tl.uint32), tl.load(angle_ptr + i).to(tl.uint32))
    tl.store(pairs_ptr + i, a)
    tl.store(pairs_ptr + N + i, b)


def test_box_muller_from_end_to_end(triton_kernels):
    """Relative to the radius, also where the logarithm is close to 0 and at the ends of the quarters of the circle."""
    powers = [2**k + d for k in range(32) for d in (-1, 0, 1)]
    words = torch.tensor([w for p in powers for w in (p, 2**32 - 1 - p)] + [0, 2**32 - 1] * 32)
    angles = words[torch.randperm(256, generator=torch.Generator().manual_seed(3))]
    ours = torch.empty(2, 256)
    pairs[(1,)](words, angles, ours, N=256)
    uniform = (words.numpy().astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(uniform)), angles.numpy() * (2 * math.pi / 2**32)
    error = np.abs(ours.numpy() - radius * np.stack([np.cos(angle), np.sin(angle)]))
    assert radius.max() > 6.7 and radius.min() == 0 and (error <= 3e-7 * radius).all()


def test_normals(triton_kernels):
    """At phi = pi/2 z is the noise: x / 255 there times the cosine of that float32 adds 1e-10."""
    index, images = torch.arange(40), torch.full((40, 16, 16, 4), 128, dtype=torch.uint8)
    eps = diffuse(images, torch.full((40,), math.pi / 2), noise_key(7), index).permute(0, 2, 3, 1)
    assert (eps - expected_noise((7, 0, 0, 0), index, (16, 16, 4))).abs().max() < 1e-6
    assert_relative(eps.reshape(40, -1), philox.normals(7, 0, 0, 0, index, 1024), 1e-6)


def test_x_and_velocity(triton_kernels):
    """x at 0, exactly at the ends; v, the derivative of z, a quarter turn on."""
    images, index = draw_images(2, 4, 4, 3), torch.tensor([5, 6])
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    key, phi = noise_key(*KEY), torch.tensor([0.4, 1.2])
    x = diffuse(images, torch.zeros(2), key, index)
    assert (x[:, :, 0, 0] == -1).all() and (x[:, :, 0, 1] == 1).all()
    assert_relative(x, images.permute(0, 3, 1, 2).double() / 127.5 - 1, 1e-7)
    cos, sin = (f(phi.double())[:, None, None, None] for f in (torch.cos, torch.sin))
    v = cos * expected_noise(KEY, index, (4, 4, 3)).permute(0, 3, 1, 2) - sin * x.double()
    assert_relative(diffuse(images, phi + math.pi / 2, key, index), v, 1e-6)


def test_a_number_depends_on_its_place_in_the_global_batch_alone(triton_kernels):
    images, phi, index = draw_images(4, 6, 6, 3), torch.linspace(0.2, 1.4, 4), torch.tensor([9, 4, 0, 7])
    whole = diffuse(images, phi, noise_key(3), index)
    halves = [diffuse(*(t[part] for t in (images, phi)), noise_key(3), index[part]) for part in (slice(2), slice(2, 4))]
    assert torch.equal(whole, torch.cat(halves))
    for fields in [(4,), (3, 1), (3, 0, 1), (3, 0, 0, 1), (3 + 2**32,)]:
        assert (diffuse(images, phi, noise_key(*fields), index) != whole).float().mean() > 0.99


def test_strided_arguments(triton_kernels):
    images, phi, index = draw_images(3, 4, 4, 3), torch.tensor([0.4, 0, 1.2, 0, 0.9]), torch.tensor([5, 0, 6, 0, 2])
    key = torch.stack([noise_key(*KEY), noise_key(0)], dim=1)[:, 0]
    flip = torch.tensor([True, True, False, True, True])
    z = diffuse(images, phi[::2], key, index[::2], flip[::2])
    assert_relative(z, expected_mixture(images, phi[::2], KEY, index[::2], flip[::2]), 1e-6)


@pytest.mark.parametrize("phi", [-2.0, -0.1, 2.5, 4.0, 6.2, 20.0])
def test_any_angle(triton_kernels, phi):
    images, index, phi = draw_images(1, 4, 4, 1), torch.tensor([2]), torch.tensor([phi])
    assert_relative(
        diffuse(images, phi, noise_key(1), index), expected_mixture(images, phi, (1, 0, 0, 0), index, None), 1e-6
    )


def test_the_key_holds_the_fields():
    seed, stream, round_index, update = KEY
    words = [seed & 0xFFFFFFFF, seed >> 32, update, stream << 16 | round_index]
    assert noise_key(*KEY).tolist() == words and noise_key(*KEY).dtype == torch.int64
    index = torch.tensor(INDEX)
    assert torch.equal(philox.normals_from_key(noise_key(*KEY), index, 9), philox.normals(*KEY, index, 9))
    for fields in [(-1,), (2**64,), (0, 2**16), (0, 0, 2**16), (0, 0, 0, 2**32)]:
        with pytest.raises(ValueError, match="seed|counter field"):
            noise_key(*fields)


def test_double_precision_runs_in_pytorch():
    images, phi, index = draw_images(2, 4, 4, 3), torch.tensor([0.4, 1.2], dtype=torch.float64), torch.tensor([5, 6])
    z = diffuse(images, phi, noise_key(*KEY), index, dtype=torch.float64)
    assert z.dtype == torch.float64
    assert_relative(z, expected_mixture(images, phi, KEY, index, None), 1e-6)
    with use("triton"), pytest.raises(ValueError, match="diffuse: dtype is torch.float64"):
        diffuse(images, phi, noise_key(*KEY), index, dtype=torch.float64)


def test_images_in_another_order_run_in_pytorch(triton_kernels):
    images, phi, index = draw_images(2, 3, 4, 4).permute(0, 2, 3, 1), torch.tensor([0.4, 1.2]), torch.tensor([5, 6])
    with pytest.raises(ValueError, match="diffuse: images are not contiguous"):
        diffuse(images, phi, noise_key(*KEY), index)
    with use("auto"):
        z = diffuse(images, phi, noise_key(*KEY), index)
    assert_relative(z, expected_mixture(images, phi, KEY, index, None), 1e-6)


def test_opcheck(triton_kernels):
    arguments = draw_images(2, 4, 4, 3), torch.tensor([0.4, 1.2]), noise_key(*KEY), torch.tensor([5, 6])
    for flip in (None, torch.tensor([True, False])):
        torch.library.opcheck(torch.ops.pdfast_kernels.diffuse.default, (*arguments, flip, torch.float16))


def test_compiled_without_a_graph_break(triton_kernels):
    arguments = draw_images(2, 4, 4, 3), torch.tensor([0.4, 1.2]), noise_key(*KEY), torch.tensor([5, 6])
    for mode in ("triton", "reference"):
        with use(mode):
            compiled = torch.compile(diffuse, fullgraph=True, backend="aot_eager")(*arguments)
            assert torch.equal(compiled, diffuse(*arguments))


def test_no_gradient():
    phi = torch.tensor([0.4]).requires_grad_()
    assert not diffuse(draw_images(1, 4, 4, 3), phi, noise_key(0), torch.tensor([0])).requires_grad


def test_what_does_not_fit_is_named():
    images, phi, key, index = draw_images(2, 4, 4, 3), torch.zeros(2), noise_key(0), torch.arange(2)
    for arguments, message in [
        ((images[0], phi, key, index), r"images has shape \(4, 4, 3\), expected \[N, H, W, C\]"),
        ((images.float(), phi, key, index), "images is torch.float32, expected torch.uint8"),
        ((images, phi[:1], key, index), r"phi has shape \(1,\), expected \(2,\)"),
        ((images, phi.int(), key, index), "phi is torch.int32, expected a floating-point type"),
        ((images, phi, key[:2], index), r"key has shape \(2,\), expected \(4,\)"),
        ((images, phi, key.int(), index), "key is torch.int32, expected torch.int64"),
        ((images, phi, key, index[:1]), r"index has shape \(1,\), expected \(2,\)"),
        ((images, phi, key, index.int()), "index is torch.int32, expected torch.int64"),
        ((images, phi, key, index, phi), "flip is torch.float32, expected torch.bool"),
        ((images, phi, key, index, phi[:1].bool()), r"flip has shape \(1,\), expected \(2,\)"),
        ((images, phi, key, index, None, torch.int32), "dtype is torch.int32, expected a floating-point type"),
        ((images, phi, key.to("meta"), index), "key is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"diffuse: {message}"):
            diffuse(*arguments)
