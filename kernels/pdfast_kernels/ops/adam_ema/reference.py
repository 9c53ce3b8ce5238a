"""Adam and the EMAs in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@torch.no_grad()
def adam_ema(
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor] | None,
    gradients: Sequence[Tensor],
    scalars: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    second_averages: list[Tensor] | None = None,
) -> None:
    """In place. scalars: learning rate, step, clip factor, average rate, skip flag, and where there are second averages their
    rate."""
    learning_rate, step, clip, average_rate, skip, *second_average_rate = scalars.tolist()
    if skip != 0 or not parameters:
        return
    gradients = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
    if clip != 1:
        gradients = list(torch._foreach_mul(gradients, clip))
    adamw(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(step - 1, device=p.device, dtype=torch.float32) for p in parameters],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if averages is not None:
        torch._foreach_lerp_(averages, parameters, average_rate)
    if second_averages is not None:
        torch._foreach_lerp_(second_averages, parameters, *second_average_rate)
