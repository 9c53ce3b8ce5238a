"""How long an update takes on a GPU that need not be there: predicted, not measured.

A U-Net runs forward and backward on tensors without content. Convolutions, matrix products, norms and attention are kernels, what
is left of a compiled block is one pass over what comes in and goes out, and what is left outside of blocks are PyTorch's own kernels. Each takes

    START + operations / (share of the peak) + bytes / (share of the bandwidth)

with the same shares for every network and GPU.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pdfast.engine.cost import empty_network, inputs, parameters_and_flops
from pdfast.networks import NetworkConfig
from pdfast.plan.cost import FLOAT, Job, fuse, parameters
from pdfast_kernels.ops.group_norm.group_norm import is_resident

GpuName = Literal["h200", "h100", "b200", "a100"]


class Gpu(NamedTuple):
    """Dense bf16 operations and bytes a second, as its maker states them. arch: its compute capability, 90 for 9.0."""

    title: str
    arch: int
    flops: float
    bandwidth: float


GPUS: dict[GpuName, Gpu] = {
    "h200": Gpu("an H200", 90, 989e12, 4.8e12),
    "h100": Gpu("an H100", 90, 989e12, 3.35e12),  # SXM
    "b200": Gpu("a B200", 100, 2250e12, 8.0e12),
    "a100": Gpu("an A100", 80, 312e12, 2.04e12),  # SXM, 80 GB
}

FITTED = "one H200's update of cifar10 and its kernels of imagenet64 (benchmarks/results/h200)"
"""By hand, with the same constants for both: first.json has an update of cifar10 by kind, and the ends; tune.json the norms and the
attention of imagenet64; first-imagenet64-before.json its convolutions, products and optimizer, whose code is the same since then."""
NO_TIME = math.inf
SHARES = {
    "convolutions": (0.74, NO_TIME),
    "ends": (NO_TIME, 0.18),
    "group_norm": (NO_TIME, 0.41),
    "group_norm, streamed": (NO_TIME, 0.71),
    "attention": (0.47, 0.64),
    "matrix products": (0.80, 0.95),
    "steps, noise and loss": (NO_TIME, 0.80),
    "compiled by Inductor": (NO_TIME, 0.77),
    "copies": (NO_TIME, 0.40),
    "rest of PyTorch": (NO_TIME, 0.55),
    "optimizer": (NO_TIME, 0.82),
}
"""Of the peak and of the bandwidth, by kind of work; kinds are those of `benchmarks.first`, and the ends by themselves."""
START = 3e-6
"""Seconds of a kernel beside its work."""
BETWEEN = 0.015
"""Time between kernels in a CUDA graph, of that of the kernels: 58.33 to 57.56 ms, 367.1 to 360.1."""
TILE = 128
"""A convolution computes its channels in multiples of it: so imagenet64's, of 192 and 576, fit the same share as cifar10's, of 256."""
OF_PEAK = 0.39
"""Of a network that is not counted by kind, its operations in five forwards: cifar10 reached 0.40 and imagenet64 0.39."""
TENSORS_OF_IMAGES, STEPS = 15, 4
"""Float32 tensors of the images' shape that the kernels of steps, noise and loss read and write, and how many kernels they are."""
COPIES = ("_to_copy", "cat", "clone", "copy_")


class Kernel(NamedTuple):
    """A call on the GPU: its kind (of SHARES), operations and bytes. waste: operations that it does for each that counts."""

    kind: str
    flops: float
    bytes: float
    waste: float = 1.0

    def seconds(self, gpu: Gpu) -> float:
        of_peak, of_bandwidth = SHARES[self.kind]
        return START + self.waste * self.flops / (of_peak * gpu.flops) + self.bytes / (of_bandwidth * gpu.bandwidth)


class _Kernels(TorchDispatchMode):
    """Lists the kernels of what runs within it, as they would be on sm_`arch`."""

    def __init__(self, network: Any, arch: int) -> None:
        super().__init__()
        self.list: list[Kernel] = []
        self._arch = arch
        self._enter()
        self._in_block = False
        for block in network.blocks():
            for hook in (block.register_forward_pre_hook, block.register_full_backward_pre_hook):
                hook(self._enter)
            for hook in (block.register_forward_hook, block.register_full_backward_hook):
                hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._in_block = True
        self._alive: list[Any] = []  # so that no storage's name is used again
        self._copied: set[int] = set()
        self._read: dict[int, int] = {}  # by storage, bytes
        self._made: dict[int, Tensor] = {}  # what fused operations made
        self._by_fused: set[int] = set()
        self._by_kernels: set[int] = set()

    def _leave(self, *_: Any) -> None:
        """Count what Inductor fuses: what comes in is read once, and written is what kernels read, or nothing here."""
        if self._in_block:
            written = (
                t.nbytes for key, t in self._made.items() if key in self._by_kernels or key not in self._by_fused
            )
            self.list.append(Kernel("compiled by Inductor", 0, sum(self._read.values()) + sum(written)))
        self._in_block = False

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        name, given, made = operation.overloadpacket.__name__, _tensors(arguments), _tensors(result)
        if name == "zeros" or ({_storage(t) for t in made} <= {_storage(t) for t in given} and name[-1] != "_"):
            return result  # a view, or the gradient of what has none
        self._alive += given, made
        kernels = list(self._kernels_of(operation.overloadpacket, name, arguments, result, given, made))
        if self._in_block:
            self._fuse(name, given, made, bool(kernels))
        elif not kernels:
            kernels = [Kernel("copies" if name in COPIES else "rest of PyTorch", 0, _bytes(given + made))]
        self.list += kernels
        return result

    def _fuse(self, name: str, given: list[Tensor], made: list[Tensor], is_kernel: bool) -> None:
        for tensor in given:
            (self._by_kernels if is_kernel else self._by_fused).add(_storage(tensor))
            if not is_kernel and _storage(tensor) not in self._made:
                self._read[_storage(tensor)] = tensor.untyped_storage().nbytes()
        if (
            name == "convolution_backward" and _storage(given[0]) not in self._made
        ):  # its bias' gradient is a sum of its own
            self._read[_storage(given[0])] = given[0].nbytes
        if name == "convolution":  # its bias is added afterwards
            self._read[-_storage(made[0])] = made[0].nbytes
        if name == "convolution" or not is_kernel:
            self._made |= {_storage(tensor): tensor for tensor in made}

    def _kernels_of(
        self, operation: Any, name: str, arguments: Any, result: Any, given: list[Tensor], made: list[Tensor]
    ) -> Iterator[Kernel]:
        backward, moved = name.endswith("_backward"), _bytes(given + made)
        if (
            backward
            and given[0].nbytes < given[0].untyped_storage().nbytes()
            and _storage(given[0]) not in self._copied
        ):
            self._copied.add(_storage(given[0]))  # some channels of what was concatenated
            yield Kernel("copies", 0, 2 * given[0].nbytes)
        if name.startswith("group_norm_attention"):
            x = given[1] if backward else given[0]
            yield from self._attention(x, arguments[-2] if backward else arguments[1], backward)
        elif name.startswith("group_norm"):
            x = given[1] if backward else given[0]
            yield self._norm(x, arguments[4] if backward else arguments[1], backward)
        elif operation in flop_registry:
            flops = flop_registry[operation](*arguments, out_val=result)
            out, inner, *size = given[2 if backward else 1].shape if "convolution" in name else (0, 0)
            if not size or (size == [1, 1] and not backward):  # Inductor makes a product of a forward of 1x1
                yield Kernel("matrix products", flops, moved)
            elif given[0].dtype == torch.float32:
                yield Kernel("ends", flops, moved)
            elif backward:
                yield from (Kernel("convolutions", flops / 2, moved, -(-n // TILE) * TILE / n) for n in (inner, out))
            else:
                yield Kernel("convolutions", flops, moved, -(-out // TILE) * TILE / out)

    def _norm(self, x: Tensor, groups: int, backward: bool) -> Kernel:
        if is_resident(tuple(x.shape), groups, self._arch, backward=backward):
            return Kernel("group_norm", 0, (3 if backward else 2) * x.nbytes)
        return Kernel("group_norm, streamed", 0, (5 if backward else 3) * x.nbytes)

    def _attention(self, x: Tensor, groups: int, backward: bool) -> Iterator[Kernel]:
        """Of `group_norm_attention`, whose backward normalises again and adds up the gradients of two biases."""
        yield self._norm(x, groups, False)
        for out in (3, 1):
            product = Kernel("matrix products", 2 * x.numel() * x.shape[1] * out, (1 + out) * x.nbytes)
            yield from [product, product] if backward else [product]
        pairs = x.numel() * x[0, 0].numel()  # times channels
        yield Kernel("attention", (10 if backward else 4) * pairs, (9 if backward else 4) * x.nbytes)
        yield Kernel("rest of PyTorch", 0, 3 * x.nbytes)
        if backward:
            yield self._norm(x, groups, True)
            yield from (Kernel("rest of PyTorch", 0, of_x * x.nbytes) for of_x in (1, 3))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def is_counted(network: Any) -> bool:
    """Tell whether its kernels are: those of our U-Net."""
    return isinstance(network, NetworkConfig)


@lru_cache
def kernels(network: NetworkConfig, dtype: torch.dtype, images: int, arch: int) -> tuple[list[Kernel], list[Kernel]]:
    """Return those of a forward and of a backward of so many images, with activations of `dtype`."""
    model = empty_network(network)
    model.dtype = dtype
    fuse(model)
    with _Kernels(model, arch) as found:
        output = model(*inputs(network, images, "meta"))
        forward, found.list = found.list, []
        output.backward(output)
    return forward, found.list


def seconds_of_forward(gpu: Gpu, job: Job) -> float:
    """Return seconds of a forward of one image in a micro-batch of one process."""
    if not is_counted(job.network):
        return parameters_and_flops(job.network)[1] / (OF_PEAK * gpu.flops)
    forward, _ = kernels(job.network, job.dtype, job.micro_batch, gpu.arch)
    return (1 + BETWEEN) * sum(kernel.seconds(gpu) for kernel in forward) / job.micro_batch


def seconds_of_update(gpu: Gpu, job: Job) -> dict[str, float]:
    """Return seconds of an update of one process by kind of work. Communication is not in it."""
    forwards = job.micro_batches * (job.cost.evaluations + job.recompute)
    if not is_counted(job.network):
        images = job.micro_batch * (forwards + 2 * job.micro_batches)
        return {"all kinds": images * seconds_of_forward(gpu, job)}
    of_parameter = 8 * FLOAT + 2 * FLOAT * (job.average + job.cost.fast_average)  # the gradient's norm is taken before
    optimizer = Kernel("optimizer", 0, of_parameter * parameters(job.network).all / job.shards)
    images = TENSORS_OF_IMAGES * FLOAT * job.micro_batch * math.prod(job.network.image_shape)
    step = Kernel("steps, noise and loss", 0, images / STEPS)
    forward, backward = kernels(job.network, job.dtype, job.micro_batch, gpu.arch)
    found = dict.fromkeys((kind for kind in SHARES if not kind.endswith("streamed")), 0.0)
    once, several = [optimizer], STEPS * [step]
    for of, times in ((forward, forwards), (backward, job.micro_batches), (several, job.micro_batches), (once, 1)):
        for kernel in of:
            found[kernel.kind.removesuffix(", streamed")] += times * kernel.seconds(gpu)
    return found | {"between kernels": BETWEEN * sum(found.values())}
