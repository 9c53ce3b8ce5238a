"""`AdamEma`: Adam with decoupled weight decay, a clipped gradient and up to two moving averages of the weights, in one
launch.

    g = clip gradient               p = p - learning_rate weight_decay p - learning_rate m_hat / (sqrt(v_hat) + eps)
    m = beta1 m + (1 - beta1) g     m_hat = m / (1 - beta1^step)
    v = beta2 v + (1 - beta2) g^2   v_hat = v / (1 - beta2^step)         average = average + average_rate (p - average)

p, m, v, average   float32 of any shapes, all in one memory order (contiguous, or channels-last)
second average     as the first, with a rate of its own: p is read once for both. Either may be without the other
gradients          bf16, fp16 or fp32, all of one dtype; those in another memory order are copied first. None is refused
scalars            float32 or float64 [6] on the device, see `Scalar`, or [5] where there is no second average: a CUDA
                   graph replays with what is written there.
                   The kernel computes with them in float32, PyTorch with what they are. Where the skip flag is not 0 (NaN
                   is not), nothing changes at all

This is torch.optim.AdamW in float32. Each tensor is read and written once. The kernel finds its place in a table of
chunks and its tensors in a table of addresses, so that thousands of tensors are one launch; a chunk's accesses are of 4
elements where its addresses and size allow it. A tensor whose `.data` was replaced is followed: before each step the addresses
are compared (a CUDA graph, once captured, goes on with those it has). Other dtypes and orders run in PyTorch, where the host waits
for the scalars. Not for `torch.compile`, which cannot see the addresses. `FusedAdamW` is the same as a torch.optim.Optimizer.
"""

import math
import operator
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from pdfast_kernels.ops.adam_ema import reference
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Blocks, Table
from pdfast_kernels.runtime.dispatch import KERNEL_DTYPES, check_device, check_floating, check_shape, triton_runs
from pdfast_kernels.runtime.launch import arch_of, launch
from pdfast_kernels.runtime.layout import is_channels_last
from pdfast_kernels.runtime.triton import jit, tl

OP = "adam_ema"

# By the elements of all parameters: the chunk of a program.
TABLE = Table(OP, {ANY: (Blocks(UNBOUNDED, 2048, 8),)})
WIDE_BYTES = 16
PLAIN = (Tensor, torch.nn.Parameter)  # what lies at the address of another is not known


class Scalar(IntEnum):
    """The places of the scalars."""

    LEARNING_RATE = 0
    STEP = 1  # 1 in the first step
    CLIP = 2  # the factor of the gradients
    AVERAGE_RATE = 3  # 1 - decay: a decay near 1 would lose it in float32
    SKIP = 4
    SECOND_AVERAGE_RATE = 5  # read only where there is a second average


@jit
def _one_minus_exp(y):
    """1 - exp(y) for y <= 0, to a relative 1e-6 also where y is close to 0."""
    series = 1.0 + y * (1 / 5) * (1.0 + y * (1 / 6) * (1.0 + y * (1 / 7)))
    series = -y * (1.0 + y * (1 / 2) * (1.0 + y * (1 / 3) * (1.0 + y * (1 / 4) * series)))
    return tl.where(y > -0.3, series, 1.0 - tl.exp(y))


@jit
def _pointer(address, first, TYPE: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, TYPE.primitive_bitwidth // 2)  # 4 elements at a time, of any type
    return pointer + first


@jit
def _update(
    parameter,  # addresses
    exp_avg,
    exp_avg_sq,
    average,
    second_average,
    gradient,
    first,
    remaining,
    clip,
    decay,
    step_size,
    root_scale,
    average_rate,
    second_average_rate,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    GRADIENT: tl.constexpr,
    AVERAGED: tl.constexpr,
    TWICE_AVERAGED: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    parameter_ptr = _pointer(parameter, first, tl.float32, WIDE)
    exp_avg_ptr = _pointer(exp_avg, first, tl.float32, WIDE)
    exp_avg_sq_ptr = _pointer(exp_avg_sq, first, tl.float32, WIDE)
    average_ptr = _pointer(average, first, tl.float32, WIDE)
    second_average_ptr = _pointer(second_average, first, tl.float32, WIDE)
    gradient_ptr = _pointer(gradient, first, GRADIENT, WIDE)
    count = tl.minimum(remaining, CHUNK).to(tl.int32)
    if WIDE:
        count = tl.multiple_of(count, 4)
    e = tl.arange(0, CHUNK)
    inside = e < count
    gradient = tl.load(gradient_ptr + e, mask=inside).to(tl.float32) * clip
    exp_avg = tl.load(exp_avg_ptr + e, mask=inside)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + e, mask=inside)
    parameter = tl.load(parameter_ptr + e, mask=inside)
    exp_avg += one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq += one_minus_beta2 * (gradient * gradient - exp_avg_sq)
    parameter -= decay * parameter
    parameter -= step_size * exp_avg / (root_scale * tl.sqrt(exp_avg_sq) + eps)
    tl.store(exp_avg_ptr + e, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + e, exp_avg_sq, mask=inside)
    tl.store(parameter_ptr + e, parameter, mask=inside)
    if AVERAGED:
        average = tl.load(average_ptr + e, mask=inside)
        tl.store(average_ptr + e, average + average_rate * (parameter - average), mask=inside)
    if TWICE_AVERAGED:
        average = tl.load(second_average_ptr + e, mask=inside)
        tl.store(second_average_ptr + e, average + second_average_rate * (parameter - average), mask=inside)


@jit
def _step(
    chunks_ptr,  # [chunks, 2]: tensor, place in it
    sizes_ptr,  # [T]
    addresses_ptr,  # [T, 4]: of parameter, exp_avg, exp_avg_sq, average; [T, 5] with a second average
    gradients_ptr,  # [T]: addresses
    scalars_ptr,  # see Scalar
    one_minus_beta1,  # floats, which a learning rate's schedule may change: nothing is compiled again
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    GRADIENT: tl.constexpr,
    AVERAGED: tl.constexpr,
    TWICE_AVERAGED: tl.constexpr,
    ALL_WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if tl.load(scalars_ptr + 4) != 0.0:
        return
    learning_rate, step, clip = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    average_rate = tl.load(scalars_ptr + 3)
    decay = learning_rate * weight_decay
    step_size = learning_rate / _one_minus_exp(step * log_beta1)
    root_scale = tl.rsqrt(_one_minus_exp(step * log_beta2))

    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    remaining = tl.load(sizes_ptr + tensor) - first
    addresses_ptr += (5 if TWICE_AVERAGED else 4) * tensor
    parameter, exp_avg = tl.load(addresses_ptr), tl.load(addresses_ptr + 1)
    exp_avg_sq, average = tl.load(addresses_ptr + 2), tl.load(addresses_ptr + 3)
    gradient = tl.load(gradients_ptr + tensor)
    second_average, second_average_rate = average, average_rate
    if TWICE_AVERAGED:
        second_average, second_average_rate = tl.load(addresses_ptr + 4), tl.load(scalars_ptr + 5)

    wide = True
    if not ALL_WIDE:
        addresses = parameter | exp_avg | exp_avg_sq | average | gradient
        if TWICE_AVERAGED:
            addresses |= second_average
        wide = (addresses % 16 == 0) & (tl.minimum(remaining, CHUNK) % 4 == 0)
    if wide:
        _update(
            parameter, exp_avg, exp_avg_sq, average, second_average, gradient, first, remaining,
            clip, decay, step_size, root_scale, average_rate, second_average_rate, one_minus_beta1, one_minus_beta2, eps,
            GRADIENT, AVERAGED, TWICE_AVERAGED, True, CHUNK,
        )  # fmt: skip
    else:
        _update(
            parameter, exp_avg, exp_avg_sq, average, second_average, gradient, first, remaining,
            clip, decay, step_size, root_scale, average_rate, second_average_rate, one_minus_beta1, one_minus_beta2, eps,
            GRADIENT, AVERAGED, TWICE_AVERAGED, False, CHUNK,
        )  # fmt: skip


def check_settings(op: str, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise a ValueError for values out of range."""
    if not (all(0 <= beta < 1 for beta in betas) and eps >= 0 and weight_decay >= 0):
        raise ValueError(f"{op}: betas {betas}, eps {eps} or weight_decay {weight_decay} is out of range")


class AdamEma:
    """Adam over `parameters`, in place, with state tensors that the caller made and keeps.

    parameters, exp_avgs, exp_avg_sqs, averages, second_averages: tensors of the same shapes and dtypes on one device. Without
    averages, or second averages, there is none. betas in [0, 1), eps and weight_decay at least 0. ValueError where something does not fit, in a step too: where
    one of the tensors has become another shape or has moved to another device than the others.
    """

    _page: Tensor | None
    _gradient_table: Tensor

    def __init__(
        self,
        parameters: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        averages: Sequence[Tensor] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_averages: Sequence[Tensor] | None = None,
    ) -> None:
        self._parameters, self._exp_avgs, self._exp_avg_sqs = list(parameters), list(exp_avgs), list(exp_avg_sqs)
        self._averages = None if averages is None else list(averages)
        self._second_averages = None if second_averages is None else list(second_averages)
        self.configure(betas, eps, weight_decay)
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._look()

    def configure(self, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """What the next steps use. ValueError for values out of range."""
        check_settings(OP, betas, eps, weight_decay)
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay

    def step(self, gradients: Sequence[Tensor], scalars: Tensor) -> None:
        """One step. gradients: of the parameters' shapes; scalars: in the order of `Scalar`, the last needed for second averages
        alone."""
        if self._seen() != self._addresses_seen:
            self._look()
        if scalars.shape != (len(Scalar),):
            check_shape(OP, "scalars", scalars, (len(Scalar) - (self._second_averages is None),))
        check_device(OP, self._device, scalars=scalars)
        if scalars.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{OP}: scalars is {scalars.dtype}, expected torch.float32 or torch.float64")
        if len(gradients) != len(self._parameters):
            raise ValueError(f"{OP}: {len(gradients)} gradients for {len(self._parameters)} parameters")
        layouts = [None if gradient is None else gradient.layout for gradient in gradients]
        if layouts.count(torch.strided) < len(layouts):
            i, layout = next((i, layout) for i, layout in enumerate(layouts) if layout is not torch.strided)
            raise ValueError(f"{OP}: gradients[{i}] is {layout}: leave the parameter out, or give a dense gradient")
        if not triton_runs(OP, self._device, self._unsupported or _why_not_gradients(gradients)):
            self._check("gradients", gradients)
            states = self._parameters, self._exp_avgs, self._exp_avg_sqs, self._averages
            settings = self._betas, self._eps, self._weight_decay
            reference.adam_ema(*states, gradients, scalars, *settings, second_averages=self._second_averages)
        elif gradients:
            self._launch(gradients, scalars.float().contiguous())

    def holds(self, *lists: list[Tensor]) -> bool:
        """Tell whether it is over these very tensors: parameters, exp_avgs, exp_avg_sqs and, if there are any, averages and second
        averages."""
        own = [tensors for _, tensors in self._lists()]
        return len(own) == len(lists) and all(
            len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in zip(own, lists, strict=True)
        )

    def _lists(self) -> list[tuple[str, list[Tensor]]]:
        names = [("parameters", self._parameters), ("exp_avgs", self._exp_avgs), ("exp_avg_sqs", self._exp_avg_sqs)]
        averages = ("averages", self._averages), ("second_averages", self._second_averages)
        return [*names, *((name, tensors) for name, tensors in averages if tensors is not None)]

    def _seen(self) -> tuple[list[int], list[torch.Size]]:
        return [t.data_ptr() for t in self._addressed], [p.shape for p in self._parameters]

    def _look(self) -> None:
        """Check the tensors and where they are: at first, and when one has been exchanged."""
        self._device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._shapes, self._strides = [p.shape for p in self._parameters], [p.stride() for p in self._parameters]
        for name, tensors in self._lists():
            self._check(name, tensors)
            for i, (tensor, parameter) in enumerate(zip(tensors, self._parameters, strict=True)):
                if tensor.dtype != parameter.dtype:
                    expected = f"that of its parameter, {parameter.dtype}"
                    raise ValueError(f"{OP}: {name}[{i}] is {tensor.dtype}, expected {expected}")
        self._addressed = [t for _, tensors in self._lists() for t in tensors if type(t) in PLAIN]
        reasons = (self._why_not(name, tensors) for name, tensors in self._lists())
        self._unsupported = next((reason for reason in reasons if reason), None)
        self._gradient_addresses: list[int] | None = None
        if self._unsupported is None:
            if self._capturing():
                raise ValueError(
                    f"{OP}: a tensor was exchanged before a CUDA graph is captured: take a step outside of it first"
                )
            self._build_tables()
        self._addresses_seen = self._seen()

    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _launch(self, gradients: Sequence[Tensor], scalars: Tensor) -> None:
        if any(g.stride() != stride for g, stride in zip(gradients, self._strides, strict=True)):
            self._check("gradients", gradients)
            pairs = zip(gradients, self._parameters, strict=True)
            gradients = [
                g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g) for g, p in pairs
            ]
        addresses = [g.data_ptr() for g in gradients]
        table = self._table(gradients, addresses)
        launch(
            _step,
            (len(self._chunks),),
            num_warps=self._config.num_warps,
            chunks_ptr=self._chunks,
            sizes_ptr=self._sizes,
            addresses_ptr=self._addresses,
            gradients_ptr=table,
            scalars_ptr=scalars,
            GRADIENT=getattr(tl, str(gradients[0].dtype).removeprefix("torch.")),
            one_minus_beta1=1.0 - self._betas[0],
            one_minus_beta2=1.0 - self._betas[1],
            log_beta1=math.log(max(self._betas[0], 1e-30)),
            log_beta2=math.log(max(self._betas[1], 1e-30)),
            eps=float(self._eps),
            weight_decay=float(self._weight_decay),
            AVERAGED=self._averages is not None,
            TWICE_AVERAGED=self._second_averages is not None,
            ALL_WIDE=self._wide and not any(a % WIDE_BYTES for a in addresses),
            CHUNK=self._config.block,
        )
        torch.autograd.graph.increment_version(self._parameters)

    def _table(self, gradients: Sequence[Tensor], addresses: list[int]) -> Tensor:
        """Return the gradients' addresses, on the device."""
        capturing = self._capturing()
        if addresses == self._gradient_addresses and not capturing:
            return self._gradient_table
        self._check("gradients", gradients)
        page = self._new_page() if self._page is None else self._page
        page.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
        table = page.to(self._device, non_blocking=True)
        if capturing:
            # A replay copies the page again: both stay, and the steps outside of the graph have others.
            self._captured.append((page, table))
            self._page = None
        else:
            self._gradient_addresses, self._gradient_table = addresses, table
            self._page = self._new_page()  # not the same again: the device may still have to copy it
        return table

    def _new_page(self) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty(len(self._parameters), dtype=torch.int64, device="cpu", pin_memory=pinned)

    def _build_tables(self) -> None:
        sizes = torch.tensor([p.numel() for p in self._parameters], dtype=torch.int64, device="cpu")
        self._config = TABLE.row(arch_of(self._device), int(sizes.sum()))
        counts = -(-sizes // self._config.block)
        tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
        place = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
        columns = [[t.data_ptr() for t in tensors] for _, tensors in self._lists()]
        if self._averages is None:
            columns.insert(3, [0] * len(sizes))
        self._wide = not any(a % WIDE_BYTES for column in columns for a in column) and not bool((sizes % 4).any())
        self._chunks = torch.stack([tensor, place], dim=1).int().to(self._device)
        self._sizes = sizes.to(self._device)
        self._addresses = torch.tensor(columns, dtype=torch.int64, device=self._device).t().contiguous()
        self._page = self._new_page()

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self._parameters):
            raise ValueError(f"{OP}: {len(tensors)} {name} for {len(self._parameters)} parameters")
        for i, (tensor, shape) in enumerate(zip(tensors, self._shapes, strict=True)):
            if tensor.shape != shape or tensor.device != self._device or not tensor.is_floating_point():
                check_shape(OP, f"{name}[{i}]", tensor, shape)
                check_floating(OP, **{f"{name}[{i}]": tensor})
                check_device(OP, self._device, **{f"{name}[{i}]": tensor})

    def _why_not(self, name: str, tensors: list[Tensor]) -> str | None:
        for i, (tensor, parameter) in enumerate(zip(tensors, self._parameters, strict=True)):
            if type(tensor) not in PLAIN:
                return f"{name}[{i}] is a {type(tensor).__name__}, not a plain tensor"
            if tensor.dtype != torch.float32:
                return f"{name}[{i}] is {tensor.dtype}, not float32"
            if not (tensor.is_contiguous() or is_channels_last(tensor)) or tensor.stride() != parameter.stride():
                return f"{name}[{i}] is neither contiguous nor channels-last, or not as its parameter"
        return None


def _why_not_gradients(gradients: Sequence[Tensor]) -> str | None:
    dtypes = {g.dtype for g in gradients}
    if not dtypes <= set(KERNEL_DTYPES) or len(dtypes) > 1:
        return f"gradients are of {' and '.join(sorted(map(str, dtypes)))}"
    others = {type(g) for g in gradients}.difference(PLAIN)
    return f"gradients are {' and '.join(sorted(t.__name__ for t in others))}, not plain tensors" if others else None
