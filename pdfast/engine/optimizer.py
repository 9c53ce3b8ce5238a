"""Adam with a clipped gradient, an optional moving average of the weights, and a guard against non-finite updates."""

import torch
from torch import Tensor, nn

from pdfast.errors import RunError

NON_FINITE_LIMIT = 10


class Optimizer:
    """Adam (decoupled weight decay) over `model`; with `ema` > 0 it also keeps an average of the weights."""

    def __init__(self, model: nn.Module, *, clip: float, ema: float = 0.0, weight_decay: float = 0.0) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._adam = torch.optim.AdamW(self._parameters, lr=0.0, weight_decay=weight_decay, fused=True)
        self._clip = clip
        self._decay = ema
        self._average = [p.detach().clone() for p in self._parameters] if ema else []
        self._non_finite_in_a_row = 0
        for p in self._parameters:  # so that the state exists before the first step, for checkpoints at update 0
            self._adam.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def step(self, loss: Tensor, learning_rate: float, update: int, where: str) -> Tensor:
        """Backward, clip, Adam, average. Returns the gradient's norm before clipping.

        A non-finite loss or gradient changes nothing but a count; after NON_FINITE_LIMIT in a row the run ends with a
        RunError that says `where`.
        """
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters])
        if not torch.isfinite(norm + loss.detach()):
            self._non_finite_in_a_row += 1
            if self._non_finite_in_a_row >= NON_FINITE_LIMIT:
                raise RunError(
                    f"{where}: the loss or its gradient was not finite in {NON_FINITE_LIMIT} updates in a row, up to update "
                    f"{update}; the weights were left as they were: lower the learning rate, or try another weighting"
                )
            return norm
        self._non_finite_in_a_row = 0
        nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        if self._average:
            # The usual warm-up of an average: short memory while there is little to remember.
            decay = min(self._decay, (update + 1) / (update + 10))
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The weights that count: the average where there is one."""
        values = self._average or [p.detach() for p in self._parameters]
        return dict(zip(self._names, values, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Weights, average and Adam's state, by name: what a checkpoint holds."""
        tensors = {}
        for i, (name, p) in enumerate(zip(self._names, self._parameters, strict=True)):
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": value for key, value in self._adam.state[p].items()}
            if self._average:
                tensors[f"average.{name}"] = self._average[i]
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
