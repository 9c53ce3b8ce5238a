"""Adam with a clipped gradient, an optional moving average of the weights, and a guard against non-finite updates."""

import torch
from torch import Tensor, nn

from pdfast.errors import RunError
from pdfast_kernels import AdamEma, Scalar

NON_FINITE_LIMIT = 10


class Optimizer:
    """Adam (decoupled weight decay) over `model`; with `ema` > 0 it also keeps an average of the weights."""

    def __init__(self, model: nn.Module, *, clip: float, ema: float = 0.0, weight_decay: float = 0.0) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._exp_avgs = [torch.zeros_like(p) for p in self._parameters]
        self._exp_avg_sqs = [torch.zeros_like(p) for p in self._parameters]
        self._averages = [p.detach().clone() for p in self._parameters] if ema else None
        self._steps = torch.zeros((), dtype=torch.int64)
        self._clip = clip
        self._decay = ema
        states = self._parameters, self._exp_avgs, self._exp_avg_sqs, self._averages
        self._adam = AdamEma(*states, weight_decay=weight_decay)
        self._non_finite_in_a_row = 0

    def step(self, loss: Tensor, learning_rate: float, update: int, where: str) -> Tensor:
        """Backward, clip, Adam, average. Returns the gradient's norm before clipping.

        A non-finite loss or gradient changes nothing but a count; after NON_FINITE_LIMIT in a row the run ends with a
        RunError that says `where`.
        """
        for p in self._parameters:
            p.grad = None
        loss.backward()
        gradients = [p.grad for p in self._parameters]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm + loss.detach()):
            self._non_finite_in_a_row += 1
            if self._non_finite_in_a_row >= NON_FINITE_LIMIT:
                raise RunError(
                    f"{where}: the loss or its gradient was not finite in {NON_FINITE_LIMIT} updates in a row, up to update "
                    f"{update}; the weights were left as they were: lower the learning rate, or try another weighting"
                )
            return norm
        self._non_finite_in_a_row = 0
        self._steps += 1
        # The usual warm-up of an average: short memory while there is little to remember.
        decay = min(self._decay, (update + 1) / (update + 10))
        values = {
            Scalar.LEARNING_RATE: learning_rate,
            Scalar.STEP: int(self._steps),
            Scalar.CLIP: float((self._clip / (norm + 1e-6)).clamp(max=1.0)),
            Scalar.AVERAGE_RATE: 1 - decay,
            Scalar.SKIP: 0.0,
        }
        scalars = torch.tensor([values[place] for place in Scalar], dtype=torch.float64, device=norm.device)
        self._adam.step(gradients, scalars)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The weights that count: the average where there is one."""
        values = self._averages or [p.detach() for p in self._parameters]
        return dict(zip(self._names, values, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Weights, average and Adam's state, by name: what a checkpoint holds."""
        lists = {
            "weight": [p.detach() for p in self._parameters],
            "exp_avg": self._exp_avgs,
            "exp_avg_sq": self._exp_avg_sqs,
        }
        if self._averages:
            lists["average"] = self._averages
        tensors = {"steps": self._steps}
        for key, values in lists.items():
            tensors |= {f"{key}.{name}": value for name, value in zip(self._names, values, strict=True)}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`. KeyError or RuntimeError where names or shapes differ."""
        with torch.no_grad():
            for name, value in self.state().items():
                value.copy_(tensors[name])


def linear_warmup(update: int, warmup: int) -> float:
    """Factor of the learning rate: from 0 up to 1 over `warmup` updates."""
    return min(1.0, (update + 1) / max(warmup, 1))


def linear_decay(update: int, updates: int, fraction: float = 1.0) -> float:
    """Factor of the learning rate: down to 0 over the last `fraction` of the updates."""
    return min(1.0, (updates - update) / max(fraction * updates, 1))
