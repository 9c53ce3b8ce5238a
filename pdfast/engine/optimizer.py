"""Adam with gradient clipping and up to two EMAs of the weights, on this process's shards of the parameters.

What changes between updates is in tensors on the device (learning rate, step, clip factor, whether to skip), so that a
CUDA graph replays with what is written there and the host need not wait. An update whose loss or gradient is not finite,
on any process, changes nothing but counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pdfast.config import OptimizerName
from pdfast.engine.parallelize import local
from pdfast.engine.replicas import FlatGradient
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from pdfast_kernels import AdamEma, Scalar

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Adam(Protocol):
    def step(self, gradients: Sequence[Tensor], scalars: Tensor) -> None:
        """Adam in place, with decoupled weight decay, then the averages; nothing where the skip flag is not 0."""


def _lerp(averages: Sequence[list[Tensor] | None], parameters: list[Tensor], values: Tensor, skip: Tensor) -> None:
    """Move the first and the second average towards the parameters, each by its rate."""
    for tensors, place in zip(averages, (Scalar.AVERAGE_RATE, Scalar.SECOND_AVERAGE_RATE), strict=True):
        if tensors:
            rate = torch.where(skip, 0, values[place])
            for average, parameter in zip(tensors, parameters, strict=True):
                average.lerp_(parameter, rate)


class _TorchAdam:
    """PyTorch's fused Adam, and the averages after it."""

    def __init__(self, parameters, exp_avgs, exp_avg_sqs, *averages, weight_decay: float) -> None:
        self._tensors = parameters, exp_avgs, exp_avg_sqs
        self._averages, self._weight_decay = averages, weight_decay

    def step(self, gradients: Sequence[Tensor], scalars: Tensor) -> None:
        parameters, exp_avgs, exp_avg_sqs = self._tensors
        on_cpu = scalars.device.type == "cpu"
        values = scalars.float()
        skip = values[Scalar.SKIP] != 0
        before = values[Scalar.STEP] - 1
        adamw(
            parameters,
            list(gradients),
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=[before.clone() for _ in parameters],
            fused=True,
            capturable=not on_cpu,
            grad_scale=1 / values[Scalar.CLIP],
            found_inf=skip.float(),
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=float(scalars[Scalar.LEARNING_RATE]) if on_cpu else values[Scalar.LEARNING_RATE],
            weight_decay=self._weight_decay,
            eps=EPS,
            maximize=False,
        )
        _lerp(self._averages, parameters, values, skip)


def check_backend(backend: OptimizerName) -> None:
    """Raise a UsageError for one that is not installed."""
    if backend == "apex":
        _apex()


def _apex() -> tuple[Any, Any]:
    try:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError as error:
        raise UsageError(
            f"--engine.optimizer apex: NVIDIA's apex is not installed ({error}); build it with APEX_CPP_EXT=1 "
            "APEX_CUDA_EXT=1, or choose pdfast or torch"
        ) from None
    return multi_tensor_applier, amp_C.multi_tensor_adam_capturable


class _ApexAdam:
    """NVIDIA apex's multi-tensor Adam, and the averages after it."""

    def __init__(self, parameters, exp_avgs, exp_avg_sqs, *averages, weight_decay: float) -> None:
        self._apply, self._adam = _apex()
        self._tensors = [list(parameters), exp_avgs, exp_avg_sqs]
        self._averages, self._weight_decay = averages, weight_decay

    def step(self, gradients: Sequence[Tensor], scalars: Tensor) -> None:
        values = scalars.float()
        skip = values[Scalar.SKIP] != 0
        self._apply(
            self._adam,
            skip.int().view(1),  # what apex calls an overflow: nothing happens
            [[g.float() for g in gradients], *self._tensors],
            values[Scalar.LEARNING_RATE],
            BETA1,
            BETA2,
            EPS,
            values[Scalar.STEP].int(),
            1,  # decoupled weight decay
            1,  # bias correction
            self._weight_decay,
            values[Scalar.CLIP].view(1),
        )
        _lerp(self._averages, self._tensors[0], values, skip)


class Optimizer:
    """Adam over this process's shards of the parameters; with `ema` > 0 it also keeps an EMA of the weights, and where there is a
    network `fast`, another one in that."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        clip: float,
        ema: float = 0.0,
        fast_ema: float = 0.0,
        fast: nn.Module | None = None,
        weight_decay: float = 0.0,
        backend: OptimizerName = "pdfast",
    ) -> None:
        """fast: a network as `model`, on the same device and sharded as that. Its weights become the EMA of decay `fast_ema`, in place,
        so that it can be evaluated between updates. UsageError for a backend that is not installed."""
        self._model, self._world = model, world
        self._clip, self._decays = clip, (ema, fast_ema)
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = [local(p).detach() for p in model.parameters()]
        self._sharded = world.shards > 1
        replicas = world.size > 1 and not self._sharded
        self._flat = FlatGradient(self._parameters, world.size) if replicas else None
        self._exp_avgs = [torch.zeros_like(p) for p in self._parameters]
        self._exp_avg_sqs = [torch.zeros_like(p) for p in self._parameters]
        self._averages = [p.clone() for p in self._parameters] if ema else None
        self._fast = None if fast is None else [local(p).detach() for p in fast.parameters()]
        if self._fast:
            torch._foreach_copy_(self._fast, self._parameters)
        states = self._parameters, self._exp_avgs, self._exp_avg_sqs, self._averages
        self._adam: Adam
        if backend == "pdfast":
            self._adam = AdamEma(
                *states, betas=(BETA1, BETA2), eps=EPS, weight_decay=weight_decay, second_averages=self._fast
            )
        else:
            kind = _TorchAdam if backend == "torch" else _ApexAdam
            self._adam = kind(*states, self._fast, weight_decay=weight_decay)
        device = world.device
        self._rates = torch.zeros(3, dtype=torch.float64, device=device)  # learning rate, 1 - decay of each average
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        """Steps that were taken: updates less those that were not finite."""
        self.norm = torch.zeros((), device=device)
        """The gradient's norm in the last update, before clipping."""
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)
        """Updates that were not finite: in all, and in a row up to now."""

    def set(self, update: int, learning_rate: float) -> None:
        """Set what the next `step` uses, without waiting for the device."""
        # The usual warm-up of an average: short memory while there is little to remember.
        short = (update + 1) / (update + 10)
        rates = torch.tensor([learning_rate, *(1 - min(decay, short) for decay in self._decays)], dtype=torch.float64)
        self._rates.copy_(rates if self._rates.device.type == "cpu" else rates.pin_memory(), non_blocking=True)

    def step(self, loss: Tensor) -> None:
        """Clip, update by Adam and the EMAs with the gradients in the parameters, and free them.

        loss: this process's, without gradient. Where it or the gradient is not finite, only `skipped` changes.
        """
        gradients = [local(p.grad) for p in self._model.parameters()]  # type: ignore[arg-type]
        if self._flat:
            gradients, loss = self._flat.average(gradients, loss)
        norm = nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm + loss)
        if self._sharded:
            norm, finite = self._over_all(norm, finite)
        self.norm.copy_(norm)
        self.skipped.add_(~finite).mul_(torch.stack([torch.ones_like(finite), ~finite]))
        self.steps.add_(finite)
        scalars = torch.stack(
            [
                self._rates[0],
                self.steps.double(),
                (self._clip / (norm + 1e-6)).clamp(max=1.0).double(),
                self._rates[1],
                (~finite).double(),
                self._rates[2],
            ]
        )
        self._adam.step(gradients, scalars)
        for p in self._model.parameters():
            p.grad = None

    def _over_all(self, norm: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm over all shards, and whether everything is finite on all processes."""
        # Each replica holds the same gradient: of the sum over all processes it is one part in so many.
        square = norm.double().square() / (self._world.size // self._world.shards)
        bad = (~finite).double()
        totals = torch.stack([torch.where(finite, square, 0), bad])
        dist.all_reduce(totals)
        return totals[0].sqrt().float(), totals[1] == 0

    def copy_ema_to_model(self) -> None:
        """Copy the EMA weights, if any, into the model: not those of `fast`."""
        if self._averages:
            torch._foreach_copy_(self._parameters, self._averages)

    def reset(self) -> None:
        """Reset to a new optimizer of the weights that the model has now."""
        for tensors in (self._exp_avgs, self._exp_avg_sqs):
            torch._foreach_zero_(tensors)
        for averages in (self._averages, self._fast):
            if averages:
                torch._foreach_copy_(averages, self._parameters)
        for counter in (self.steps, self.skipped):
            counter.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return weights, EMAs and Adam's state, this process's shards, by name: what a checkpoint holds."""
        lists = {"weight": self._parameters, "exp_avg": self._exp_avgs, "exp_avg_sq": self._exp_avg_sqs}
        if self._averages:
            lists["average"] = self._averages
        if self._fast:
            lists["fast"] = self._fast
        return {
            f"{key}.{name}": value
            for key, values in lists.items()
            for name, value in zip(self._names, values, strict=True)
        }

    def counters(self) -> dict[str, Tensor]:
        """Return the rest of the state, equal on all processes."""
        return {"steps": self.steps, "skipped": self.skipped}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` and `counters` returned. KeyError or RuntimeError where names or shapes differ."""
        for name, value in (self.state() | self.counters()).items():
            value.copy_(tensors[name])


def linear_warmup(update: int, warmup: int) -> float:
    """Return the factor of the learning rate: from 0 up to 1 over `warmup` updates."""
    return min(1.0, (update + 1) / max(warmup, 1))


def linear_decay(update: int, updates: int, fraction: float = 1.0) -> float:
    """Return the factor of the learning rate: down to 0 over the last `fraction` of the updates."""
    return min(1.0, (updates - update) / max(fraction * updates, 1))
