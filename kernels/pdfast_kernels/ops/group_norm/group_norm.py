"""`group_norm`: GroupNorm with an optional FiLM and an optional SiLU, on channels-last tensors.

    xhat = (x - mean) rstd          mean and variance over the group's channels and all positions
    u    = (xhat weight + bias) (1 + scale) + shift
    y    = silu(u) or u

x               [N, C, ...] bf16, fp16 or fp32, dense with the channels last (channels_last images; [N, C, L] transposed
                from [N, L, C]); C % num_groups == 0, any sizes, more than 2^31 elements too
weight, bias    [C] or None;  scale, shift [N, C] or None, any row stride (the halves of one linear layer's output)
y               like x;  the gradients like what they are of

float32 inside. A sample's groups that fit on chip are read once (`forward_resident`, `backward_resident`), larger ones
twice: sums of row chunks, `merge`, apply. Moments are of centred values and chunks are merged as such (Chan et al. 1983), so
that a mean of 1000 standard deviations costs nothing. No atomics: the same bits on every run, and for a sample in any
batch. Saved for the backward: x, the parameters, and mean and rstd [N, num_groups]. Other layouts and dtypes run in PyTorch.
"""

from math import lcm, prod
from typing import NamedTuple

import torch
from torch import Tensor

from pdfast_kernels.ops.group_norm import reference
from pdfast_kernels.ops.group_norm.group_norm_kernels import (
    apply,
    apply_gradient,
    backward_resident,
    chunk_gradient_sums,
    chunk_moments,
    forward_resident,
    merge_gradient_sums,
    merge_moments,
    parameter_gradients,
)
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Table
from pdfast_kernels.runtime.dispatch import (
    as_given,
    check_device,
    check_floating,
    check_shape,
    triton_runs,
    unsupported_dtype,
)
from pdfast_kernels.runtime.launch import arch_of, cdiv, launch, next_power_of_2
from pdfast_kernels.runtime.namespace import in_namespace


class Tiles(NamedTuple):
    """For groups of at most so many elements; the tiles in elements too."""

    group: float
    resident: int  # the least of a resident tile, where there are as many
    most: int  # the most of it: larger groups are streamed
    per_warp: int  # of it, for a warp: 4 to 16 warps
    stream: int  # a tile of the streaming kernels, the widest that leaves fewest lanes idle
    tiles: int  # of it in a chunk
    stages: int  # of those, loaded at a time
    stream_warps: int


# The backward holds two tensors of a tile.
_SHIPPED = Tiles(UNBOUNDED, 4096, 16384, 1024, 2048, 16, 4, 4)
_FEWER_WARPS = _SHIPPED._replace(group=1536, per_warp=2048)  # with 8, triton 3.6.0 would spill there
FORWARD = Table("group_norm forward", {ANY: (_SHIPPED,), 80: (_SHIPPED._replace(group=1535), _FEWER_WARPS, _SHIPPED)})
_OF_TWO = _SHIPPED._replace(most=8192)
_WIDER = Tiles(8192, 16384, 16384, 1024, 2048, 16, 4, 4)
BACKWARD = Table("group_norm backward", {ANY: (_OF_TWO,), 90: (_OF_TWO._replace(group=7168), _WIDER, _OF_TWO)})
RESIDENT_CHANNELS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
STREAM_CHANNELS = (256, 128, 64, 32)
MERGED_ROWS, MERGED_CHANNELS, PARAMETER_CHANNELS = 32, 128, 32
MOST_MEMBERS = 4096  # of the table of channels and groups that a resident tile sums by: 32 a thread


class _Shape(NamedTuple):
    """x as [n, rows, channels] in memory, cpg channels a group."""

    n: int
    rows: int
    channels: int
    cpg: int

    @classmethod
    def of(cls, x: Tensor, num_groups: int) -> "_Shape":
        n, channels, *rest = x.shape
        return cls(n, prod(rest), channels, channels // num_groups)

    def tiles(self, table: Table, x: Tensor) -> Tiles:
        return table.row(arch_of(x.device), self.rows * self.cpg)


def _resident(shape: _Shape, tiles: Tiles) -> dict[str, int] | None:
    """Return the constants of a resident launch; None where no tile holds whole groups.

    The narrowest tile of enough elements (else the widest), whose rows are of whole groups and, where the channels allow, of
    whole 16-byte words; before that the one that leaves fewest lanes idle. Of so few groups that their table stays small.
    """
    unit = lcm(shape.cpg, 8) if shape.channels % 8 == 0 else shape.cpg
    block_r = next_power_of_2(shape.rows)
    fitting = []
    for block_c in RESIDENT_CHANNELS:
        channels = min(block_c // unit * unit, shape.channels)
        members = block_c * next_power_of_2(channels // shape.cpg)
        if channels and block_r * block_c <= tiles.most and members <= MOST_MEMBERS:
            lanes = cdiv(shape.channels, channels) * block_c
            few = block_r * block_c < tiles.resident and channels < shape.channels
            fitting.append((few, lanes, -block_c if few else block_c, channels))
    if not fitting:
        return None
    *_, signed, channels = min(fitting)
    block_c = abs(signed)
    return {
        "ROWS": shape.rows,
        "C": shape.channels,
        "CPG": shape.cpg,
        "CHANNELS": channels,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "BLOCK_G": next_power_of_2(channels // shape.cpg),
        "num_warps": min(max(block_r * block_c // tiles.per_warp, 4), 16),
    }


def is_resident(shape: tuple[int, ...], num_groups: int, arch: int, *, backward: bool = False) -> bool:
    """Tell whether x of this shape, [N, C, ...], is read once on sm_`arch`, and not streamed."""
    n, channels, *rest = shape
    of_x = _Shape(n, prod(rest), channels, channels // num_groups)
    return _resident(of_x, (BACKWARD if backward else FORWARD).row(arch, of_x.rows * of_x.cpg)) is not None


def _stream(shape: _Shape, tiles: Tiles) -> tuple[int, tuple[int], dict[str, int]]:
    """Return the row chunks of a sample, and the grid and the constants of the launches that read all of x."""
    block_c = min(STREAM_CHANNELS, key=lambda width: cdiv(shape.channels, width) * width)
    block_r = tiles.stream // block_c
    chunks = cdiv(shape.rows, block_r * tiles.tiles)
    constants = {
        "C": shape.channels,
        "TILES": tiles.tiles,
        "STAGES": tiles.stages,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
    }
    grid = (shape.n * cdiv(shape.channels, block_c) * chunks,)
    return chunks, grid, {**constants, "num_warps": tiles.stream_warps}


def _merge(shape: _Shape, chunks: int) -> dict[str, int]:
    return {
        "chunks": chunks,
        "C": shape.channels,
        "CPG": shape.cpg,
        "BLOCK_K": MERGED_ROWS,
        "BLOCK_CPG": min(next_power_of_2(shape.cpg), MERGED_CHANNELS),
        "num_warps": 4,
    }


def _dense(x: Tensor) -> Tensor:
    """It with the channels last, a copy if it must be: gradients come in any layout, and so do tensors that were saved elsewhere
    for the backward (`torch.autograd.graph.save_on_cpu`)."""
    last = x.movedim(1, -1)
    return x if last.is_contiguous() else last.contiguous().movedim(-1, 1)


def _parameters(weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> dict:
    # As they were saved, so they come back; but hooks may give them any strides.
    weight, bias, scale, shift = (
        p if p is None or p.stride(-1) == 1 else p.contiguous() for p in (weight, bias, scale, shift)
    )
    return {
        "weight_ptr": weight,
        "bias_ptr": bias,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "scale_stride": 0 if scale is None else scale.stride(0),
        "shift_stride": 0 if shift is None else shift.stride(0),
    }


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x; mean and rstd, float32 [N, num_groups]."""
    shape, x = _Shape.of(x, num_groups), _dense(x)
    y = torch.empty_like(x)
    mean = torch.empty(shape.n, num_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    tensors = {"x_ptr": x, "mean_ptr": mean, "rstd_ptr": rstd, **_parameters(weight, bias, scale, shift)}
    tiles = shape.tiles(FORWARD, x)
    if resident := _resident(shape, tiles):
        grid = (shape.n * cdiv(shape.channels, resident["CHANNELS"]),)
        launch(forward_resident, grid, **tensors, y_ptr=y, EPS=eps, SILU=silu, **resident)
        return y, mean, rstd
    chunks, grid, stream = _stream(shape, tiles)
    partial = torch.empty(shape.n, chunks, 2, shape.channels, dtype=torch.float32, device=x.device)
    launch(chunk_moments, grid, x_ptr=x, partial_ptr=partial, rows=shape.rows, **stream)
    launch(
        merge_moments,
        (shape.n * num_groups,),
        partial_ptr=partial,
        mean_ptr=mean,
        rstd_ptr=rstd,
        rows=shape.rows,
        CHUNK_ROWS=stream["BLOCK_R"] * stream["TILES"],
        EPS=eps,
        **_merge(shape, chunks),
    )
    launch(apply, grid, **tensors, y_ptr=y, rows=shape.rows, CPG=shape.cpg, SILU=silu, **stream)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    of_parameters: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """dx like x, and the gradients of weight, bias, scale and shift: None for what is not there or not asked for."""
    shape, x, dy = _Shape.of(x, num_groups), _dense(x), _dense(dy)
    dx = torch.empty_like(x)
    sums = torch.empty(shape.n, 2, shape.channels, dtype=torch.float32, device=x.device)
    parameters = _parameters(weight, bias, scale, shift)
    inputs = {"dy_ptr": dy, "x_ptr": x, "mean_ptr": mean, "rstd_ptr": rstd, "SILU": silu, **parameters}
    tiles = shape.tiles(BACKWARD, x)
    if resident := _resident(shape, tiles):
        grid = (shape.n * cdiv(shape.channels, resident["CHANNELS"]),)
        launch(backward_resident, grid, **inputs, dx_ptr=dx, sums_ptr=sums, **resident)
    else:
        chunks, grid, stream = _stream(shape, tiles)
        partial = torch.empty(shape.n, chunks, 2, shape.channels, dtype=torch.float32, device=x.device)
        group_sums = torch.empty(shape.n, 2, num_groups, dtype=torch.float32, device=x.device)
        inputs |= {"rows": shape.rows, "CPG": shape.cpg, **stream}
        launch(chunk_gradient_sums, grid, **inputs, partial_ptr=partial)
        launch(
            merge_gradient_sums,
            (shape.n * num_groups,),
            partial_ptr=partial,
            weight_ptr=weight,
            scale_ptr=scale,
            sums_ptr=sums,
            group_sums_ptr=group_sums,
            scale_stride=parameters["scale_stride"],
            **_merge(shape, chunks),
        )
        launch(apply_gradient, grid, **inputs, group_sums_ptr=group_sums, dx_ptr=dx)
    if not of_parameters:
        return dx, [None] * 4
    gradients = [None if p is None else p.new_empty(p.shape) for p in (weight, bias, scale, shift)]
    launch(
        parameter_gradients,
        (cdiv(shape.channels, PARAMETER_CHANNELS),),
        num_warps=4,
        sums_ptr=sums,
        weight_ptr=weight,
        bias_ptr=bias,
        scale_ptr=scale,
        dweight_ptr=gradients[0],
        dbias_ptr=gradients[1],
        dscale_ptr=gradients[2],
        dshift_ptr=gradients[3],
        scale_stride=parameters["scale_stride"],
        N=shape.n,
        C=shape.channels,
        BLOCK_N=MERGED_ROWS,
        BLOCK_C=PARAMETER_CHANNELS,
    )
    return dx, gradients


_group_norm = torch.library.custom_op(in_namespace("group_norm"), forward, mutates_args=())


@_group_norm.register_fake
def _(x, num_groups, weight, bias, scale, shift, eps, silu):
    statistic = torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device)
    return torch.empty_like(x), statistic, torch.empty_like(statistic)


@torch.library.custom_op(
    in_namespace("group_norm_backward"),
    mutates_args=(),
    schema="""(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt num_groups, Tensor? weight, Tensor? bias, Tensor? scale,
    Tensor? shift, bool silu, bool of_parameters) -> Tensor[]""",
)
def _group_norm_backward(*given):
    """dx, then the gradients of the parameters there are."""
    dx, gradients = backward(*given)
    return [dx, *(g for g in gradients if g is not None)]


@_group_norm_backward.register_fake
def _(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, of_parameters):
    there = [p for p in (weight, bias, scale, shift) if p is not None and of_parameters]
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in there)]


def _setup_context(ctx, inputs, output):
    x, num_groups, weight, bias, scale, shift, _, silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
    ctx.num_groups, ctx.silu = num_groups, silu


def _autograd(ctx, dy, _mean, _rstd):
    x, mean, rstd, *parameters = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (2, 3, 4, 5)]
    dx, *there = _group_norm_backward(dy, x, mean, rstd, ctx.num_groups, *parameters, ctx.silu, any(wanted))
    there = iter(there)
    gradients = [next(there) if p is not None and any(wanted) else None for p in parameters]
    return dx, None, *gradients, None, None


_group_norm.register_autograd(_autograd, setup_context=_setup_context)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """GroupNorm of x [N, C, ...], then FiLM where scale or shift [N, C] is given, then SiLU if asked for; like x.

    The arguments up to eps are those of torch.nn.functional.group_norm. See the module for layouts and dtypes.
    ValueError where a shape, dtype, device or the number of groups does not fit.
    """
    if x.dim() < 2:
        raise ValueError(f"group_norm: x has shape {tuple(x.shape)}, expected [N, C, ...]")
    n, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm: {channels} channels of x {tuple(x.shape)} do not divide into num_groups = {num_groups}"
        )
    parameters = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    for name, parameter in parameters.items():
        if parameter is not None:
            check_shape("group_norm", name, parameter, (channels,) if name in ("weight", "bias") else (n, channels))
    check_floating("group_norm", x=x, **parameters)
    check_device("group_norm", x.device, **parameters)
    unsupported = unsupported_dtype(x=x, **parameters) or _unsupported_layout(x, **parameters)
    if x.numel() and triton_runs("group_norm", x.device, unsupported):
        return _group_norm(x, num_groups, weight, bias, scale, shift, eps, silu)[0]
    with as_given(x.device):
        y = reference.group_norm(x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)
    # PyTorch's own norm forgets the layout of channels-last images on a GPU, and of other channels-last tensors everywhere.
    return _dense(y) if x.movedim(1, -1).is_contiguous() else y


def _unsupported_layout(x: Tensor, **parameters: Tensor | None) -> str | None:
    if not x.movedim(1, -1).is_contiguous():
        return f"x has strides {tuple(x.stride())}, not those of a channels-last tensor"
    for name, parameter in parameters.items():
        if parameter is not None and parameter.stride(-1) != 1 and parameter.shape[-1] != 1:
            return f"{name} has strides {tuple(parameter.stride())}, not 1 between channels"
    return None
