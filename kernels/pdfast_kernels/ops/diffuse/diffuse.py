"""`diffuse`: images and the noise of their places in the batch, mixed at an angle.

    z = cos(phi) x + sin(phi) eps          x = images / 127.5 - 1, flipped left-right where `flip` says so

images   [N, H, W, C] uint8, contiguous
phi      [N], radians
key      [4] int64 of `noise_key`, on the device: replays of a CUDA graph draw new numbers once it is written
index    [N] int64, each sample's in the global batch, in [0, 2^32): an image of another is NaN
flip     [N] bool or None
z        [N, C, H, W] bf16, fp16 or fp32, channels-last

eps is `philox.normals` for the key and the index; its elements are counted in the memory order of z. It is never in
memory: one byte is read and one element written per value. Computed in float32: the integers are those of `philox`, the
normals within 1e-6 of Box-Muller's formula. No gradients. Since v = dz/dphi, the same call at phi + pi/2 gives v; at 0
it gives x. Other dtypes and images that are not contiguous run in PyTorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pdfast_kernels.ops.diffuse import reference
from pdfast_kernels.random import philox
from pdfast_kernels.runtime.configs import ANY, Table
from pdfast_kernels.runtime.dispatch import (
    DTYPES,
    EXPECTED_DTYPE,
    KERNEL_DTYPES,
    as_given,
    check_device,
    check_floating,
    check_shape,
    triton_runs,
)
from pdfast_kernels.runtime.index import check_index, in_range
from pdfast_kernels.runtime.launch import arch_of, cdiv, launch
from pdfast_kernels.runtime.namespace import in_namespace
from pdfast_kernels.runtime.triton import jit, tl


class Tiles(NamedTuple):
    """For elements of z of at most so many bytes: of each tile a thread stores 16 bytes."""

    bytes: int
    block: int  # elements of a tile
    tiles: int  # of a program
    num_warps: int


TABLE = Table("diffuse", {ANY: (Tiles(2, 1024, 1, 4), Tiles(4, 512, 2, 4))})


@jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32 on uint32 counters and keys: four output words."""
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57  # one instruction each, both halves
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _cos_sin(t, quarter):
    """cos and sin of pi/2 (quarter + t), for t in [-1/2, 1/2] and uint32 quarters: polynomials within 4e-8."""
    square = t * t
    cos = 1.0 + square * (-1.23369795 + square * (0.25360636 + square * -0.02042625))
    sin = t * (1.57079631 + square * (-0.64596294 + square * (0.0796759 + square * -0.00459229)))
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    # The signs are set as bits: cos is negative in quarters 1 and 2, sin in 2 and 3.
    cos_bits = cos.to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sin_bits = sin.to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    return cos_bits.to(tl.float32, bitcast=True), sin_bits.to(tl.float32, bitcast=True)


@jit
def _cos_sin_of_angle(phi):
    """cos and sin of float32 radians, of a few turns at most."""
    quarter = tl.floor(phi * 0.63661975 + 0.5)
    t = phi * 0.63661975 - quarter + phi * 2.5682552e-08  # 2/pi as a float32, and what is left of it
    return _cos_sin(t, quarter.to(tl.int32).to(tl.uint32, bitcast=True))


@jit
def _minus_two_log(u):
    """-2 log(u) for normal float32 u in (0, 1], to a relative 2e-7 also where u is close to 1."""
    bits = u.to(tl.uint32, bitcast=True)
    # u = 2^k (1 + f) with f in [-1/3, 1/3]: `exponent` is k 2^23.
    exponent = (bits - 0x3F2AAAAB).to(tl.int32, bitcast=True) & -0x800000
    f = (bits - exponent.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True) - 1.0
    p = 0.32944654 + f * (-0.28084618 + f * (0.3024436 + f * -0.27640474))
    p = -0.66666532 + f * (0.50008476 + f * (-0.4001584 + f * p))
    log = f * f * (1.0 + f * p) - 2.0 * f
    return exponent.to(tl.float32) * (-1.3862943611198906 * 2.0**-23) + log


@jit
def _normal_pair(radius_word, angle_word):
    """Box-Muller. The angle is reduced as an integer, which is exact."""
    uniform = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt(tl.maximum(_minus_two_log(uniform), 0.0))
    t = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    cos, sin = _cos_sin(t, (angle_word + 0x20000000) >> 30)
    return radius * cos, radius * sin


@jit
def _normals(group, sample, key0, key1, word2, word3):
    """Return the four normals of each counter of `group`, uint32."""
    zero = group & 0
    w0, w1, w2, w3 = philox4x32(group, zero + sample, zero + word2, zero + word3, key0, key1)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return n0, n1, n2, n3


@jit
def _forward(
    images_ptr,  # [N, M]
    phi_ptr,  # [N]
    key_ptr,  # [4]
    index_ptr,  # [N]
    flip_ptr,  # [N]
    z_ptr,  # [N, M]
    M,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    COUNTERS: tl.constexpr,  # of a thread in a tile
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK * TILES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * (BLOCK * TILES)
    images_ptr += n * M
    z_ptr += n * M
    flipped = False
    if FLIP:
        flipped = tl.load(flip_ptr + n)

    index = tl.load(index_ptr + n)
    cos, sin = _cos_sin_of_angle(tl.load(phi_ptr + n))
    cos = tl.where((index >= 0) & (index < 4294967296), cos / 255.0, float("nan"))

    sample = index.to(tl.uint32)
    key0, key1 = tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)
    word2, word3 = tl.load(key_ptr + 2).to(tl.uint32), tl.load(key_ptr + 3).to(tl.uint32)

    for tile in tl.static_range(TILES):
        e = first + tile * BLOCK + tl.arange(0, BLOCK)
        inside = e < M
        if flipped:
            pixel = e + (WIDTH - 1 - 2 * (e // C % WIDTH)) * C
            byte = tl.load(images_ptr + pixel, mask=inside, other=0)
        else:
            byte = tl.load(images_ptr + e, mask=inside, other=0)
        group = ((first + tile * BLOCK) // 4 + COUNTERS * tl.arange(0, BLOCK // (4 * COUNTERS))).to(tl.uint32)
        n0, n1, n2, n3 = _normals(group, sample, key0, key1, word2, word3)
        if COUNTERS == 2:
            m0, m1, m2, m3 = _normals(group + 1, sample, key0, key1, word2, word3)
            n0, n1, n2, n3 = tl.join(n0, m0), tl.join(n1, m1), tl.join(n2, m2), tl.join(n3, m3)
        eps = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK)  # each thread's in order, in its registers
        z = (byte.to(tl.float32) * 2.0 - 255.0) * cos + sin * eps
        tl.store(z_ptr + e, z.to(z_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op(in_namespace("diffuse"), mutates_args=())
def _diffuse(
    images: Tensor, phi: Tensor, key: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    n, _, width, channels = images.shape
    z = _empty(images, dtype)
    elements = z.numel() // max(n, 1)
    _, block, tiles, warps = TABLE.row(arch_of(z.device), z.element_size())
    launch(
        _forward,
        (n * cdiv(elements, block * tiles),),
        num_warps=warps,
        images_ptr=images,
        phi_ptr=phi,
        key_ptr=key,
        index_ptr=index,
        flip_ptr=flip,
        z_ptr=z,
        M=elements,
        C=channels,
        WIDTH=width,
        FLIP=flip is not None,
        COUNTERS=4 // z.element_size(),
        BLOCK=block,
        TILES=tiles,
    )
    return z


@_diffuse.register_fake
def _(images, phi, key, index, flip, dtype):
    return _empty(images, dtype)


def _empty(images: Tensor, dtype: torch.dtype) -> Tensor:
    n, height, width, channels = images.shape
    return torch.empty((n, height, width, channels), dtype=dtype, device=images.device).permute(0, 3, 1, 2)


def diffuse(
    images: Tensor,
    phi: Tensor,
    key: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """z = cos(phi) x + sin(phi) eps, with x the images in [-1, 1] and eps the noise of (key, index).

    images: uint8 [N, H, W, C]. phi: float [N], radians. key: int64 [4], see `noise_key`. index: int64 [N], values in
    [0, 2**32). flip: bool [N], left-right. Returns `dtype` [N, C, H, W] with channels-last strides; see the module.
    ValueError where a shape, dtype, device or index does not fit.
    """
    _check(images, phi, key, index, flip, dtype)
    index = in_range("diffuse", "index", index, 0, 1 << 32)
    unsupported = None if dtype in KERNEL_DTYPES else f"dtype is {dtype}, not bfloat16, float16 or float32"
    if not images.is_contiguous():
        unsupported = "images are not contiguous"
    if triton_runs("diffuse", images.device, unsupported):
        flip = None if flip is None else flip.contiguous()
        return _diffuse(images, phi.detach().float().contiguous(), key.contiguous(), index.contiguous(), flip, dtype)
    with as_given(images.device):
        return reference.diffuse(images, phi.detach(), key, index, flip, dtype)


def noise_key(
    seed: int, stream: int = 0, round_index: int = 0, update: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return what `diffuse` draws its noise by: int64 [4], the words of `philox.key_words` on `device`.

    ValueError for a field out of range: seed in [0, 2**64), update in [0, 2**32), stream and round in [0, 2**16).
    """
    words = torch.tensor(philox.key_words(seed, stream, round_index, update), dtype=torch.int64, device="cpu")
    return words.to(device, non_blocking=True)  # of pageable memory: staged at once, and the host does not wait


def _check(images: Tensor, phi: Tensor, key: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype) -> None:
    if images.dim() != 4:
        raise ValueError(f"diffuse: images has shape {tuple(images.shape)}, expected [N, H, W, C]")
    if images.dtype != torch.uint8:
        raise ValueError(f"diffuse: images is {images.dtype}, expected torch.uint8")
    if dtype not in DTYPES:
        raise ValueError(f"diffuse: dtype is {dtype}, {EXPECTED_DTYPE}")
    samples = images.shape[0]
    check_shape("diffuse", "phi", phi, (samples,))
    check_floating("diffuse", phi=phi)
    check_shape("diffuse", "key", key, (4,))
    if key.dtype != torch.int64:
        raise ValueError(f"diffuse: key is {key.dtype}, expected torch.int64")
    check_index("diffuse", index, samples)
    if flip is not None:
        check_shape("diffuse", "flip", flip, (samples,))
        if flip.dtype != torch.bool:
            raise ValueError(f"diffuse: flip is {flip.dtype}, expected torch.bool")
    check_device("diffuse", images.device, phi=phi, key=key, index=index, flip=flip)
