"""`FusedAdamW`: torch.optim.AdamW on the kernel of `AdamEma`, with an average of the weights if asked for.

    optimizer = FusedAdamW(model.parameters(), lr=1e-4, ema_decay=0.999)
    ...                                   optimizer.step() as ever, with schedulers, GradScaler, state_dict
    optimizer.ema()                       the averages, in the order of the parameters

One launch for all parameters of a group that have taken the same steps. Its state is that of torch.optim.AdamW ("step", "exp_avg",
"exp_avg_sq"; besides, "ema"), so that each loads the other's state_dict. "step" is float32 on the device and shared by parameters
that step together: nothing waits for the device, also under GradScaler, whose factor and whose verdict are read there. Parameters that
the kernel does not take (not float32, not dense) are stepped by PyTorch's fused Adam.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pdfast_kernels.ops.adam_ema.adam_ema import AdamEma, check_settings

_STATE = ("exp_avg", "exp_avg_sq")


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) over parameters or parameter groups.

    lr: a float, or a tensor, which a CUDA graph reads again at each replay. betas in [0, 1), eps, weight_decay and lr at least 0; all
    of them, and ema_decay, for each group. ema_decay in [0, 1]: ema = ema_decay ema + (1 - ema_decay) parameter after each step,
    from the parameters of the first on; None for no average. ValueError for others, and for amsgrad or maximize in a loaded state.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf, and does not wait

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema_decay: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        self._adams: dict[tuple[int, ...], AdamEma] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of torch.optim.AdamW: each parameter has a step of its own, which AdamW would count for itself."""
        packed = super().state_dict()
        packed["state"] = {i: state | {"step": state["step"].clone()} for i, state in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a FusedAdamW or of a torch.optim.AdamW. Averages that it does not have begin with the parameters' values."""
        for group in state_dict["param_groups"]:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError("FusedAdamW: the state was made with amsgrad or maximize, which it has not")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            shared: dict[tuple[torch.device, float], Tensor] = {}
            for p in group["params"]:
                if state := self.state.get(p):
                    count = float(state["step"])
                    step = torch.tensor(count, dtype=torch.float32, device=p.device)
                    state["step"] = shared.setdefault((p.device, count), step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adams = {}
        for group in self.param_groups:
            group.setdefault("ema_decay", self.defaults.get("ema_decay"))

    def ema(self) -> list[Tensor]:
        """Return the averages, in the order of the parameters in the groups: a parameter itself where it has none (yet)."""
        return [self.state.get(p, {}).get("ema", p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step for every parameter that has a gradient. closure: computes the loss again, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = {}
        for group in self.param_groups:
            for parameters in self._together(group):
                key, adam = self._adam(group, parameters)
                adam.configure(group["betas"], group["eps"], group["weight_decay"])
                adam.step(
                    [_local(p.grad) for p in parameters if p.grad is not None], self._scalars(group, parameters[0])
                )
                used[key] = adam
        self._adams = used
        return loss

    def _together(self, group: dict[str, Any]) -> Iterable[list[Tensor]]:
        """Return the parameters with gradients, in lists of one device and one count of steps: new ones begin, and some may
        leave others."""
        stepped: dict[int, list[Tensor]] = {}
        left: set[int] = set()
        fresh: dict[torch.device, Tensor] = {}
        for p in group["params"]:
            state = self.state[p] if p.grad is not None or p in self.state else {}
            if p.grad is None:
                left.add(id(state.get("step")))
                self._average(group, p, state)
                continue
            if not state:
                state["step"] = fresh.setdefault(p.device, torch.zeros((), dtype=torch.float32, device=p.device))
                state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in _STATE}
            if group["ema_decay"] is not None and "ema" not in state:
                state["ema"] = p.detach().clone(memory_format=torch.preserve_format)
            stepped.setdefault(id(state["step"]), []).append(p)
        for key, parameters in stepped.items():
            if key in left:  # whoever has no gradient now stays behind with the old count
                step = self.state[parameters[0]]["step"].clone()
                for p in parameters:
                    self.state[p]["step"] = step
        return stepped.values()

    def _average(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Of a parameter that has no gradient this time: it stays, and the average comes nearer."""
        if group["ema_decay"] is not None and "ema" in state:
            rate = torch.full((), 1 - group["ema_decay"], device=p.device)
            ema = _local(state["ema"])
            ema.lerp_(_local(p), (rate * (1 - self._skip(p.device))).to(ema.dtype))

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> tuple[tuple[int, ...], AdamEma]:
        names = _STATE if group["ema_decay"] is None else (*_STATE, "ema")
        states = [self.state[p] for p in parameters]
        lists = [[_local(p) for p in parameters], *([_local(state[name]) for state in states] for name in names)]
        key = tuple(map(id, parameters))
        adam = self._adams.get(key)
        return key, adam if adam is not None and adam.holds(*lists) else AdamEma(*lists)

    def _scalars(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Return what `AdamEma` reads, in the order of `Scalar`, on the device; and the step is counted unless it is
        skipped."""
        skip, scale = self._skip(p.device), getattr(self, "grad_scale", None)
        step = self.state[p]["step"].add_(1 - skip)
        decay = 1.0 if group["ema_decay"] is None else group["ema_decay"]
        one = torch.ones((), dtype=torch.float64, device=p.device)
        clip = one if scale is None else 1 / scale.to(p.device, torch.float64).reshape(())
        lr = group["lr"]
        lr = lr.to(p.device, torch.float64).reshape(()) if isinstance(lr, Tensor) else one * lr
        return torch.stack([lr, step.double(), clip, one * (1 - decay), skip.double()])

    def _skip(self, device: torch.device) -> Tensor:
        found = getattr(self, "found_inf", None)
        if found is None:
            return torch.zeros((), device=device)
        return (found.to(device).reshape(()) != 0).float()


def _check_group(group: dict[str, Any]) -> None:
    """Raise a ValueError for settings out of range, as soon as they are given."""
    lr, decay = group["lr"], group["ema_decay"]
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"FusedAdamW: lr {lr} is out of range")
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"FusedAdamW: ema_decay {decay} is out of range")
    check_settings("FusedAdamW", group["betas"], group["eps"], group["weight_decay"])
