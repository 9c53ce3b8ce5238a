"""Samplers: from noise at the schedule's last angle down to images at angle 0.

A model is any function `model(z, phi, cond) -> output`; z is [N, C, ...] float, phi [N] float32 in radians, cond a tree
of tensors with the batch first (`pdfast.diffusion.condition`), which is handed on. What it predicts is
its attribute `prediction`, or said in the call. Sampling never takes gradients.

The state is kept in float32, or in float64 for noise of that dtype, and returned so, whatever the dtypes of the noise and of
the network's output are: rounded to 16 bits at each step, it would be further off the more steps there are. The network is
given the state in the dtype of the noise: bfloat16 noise is for networks that are bfloat16 themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pdfast.diffusion.circle import (
    SMALLEST_SINE_TO_SAMPLE,
    Prediction,
    at_least_float32,
    check_angles,
    check_output,
    check_start,
    check_tensor,
    ddim_coefficients,
    to_x,
)
from pdfast.diffusion.condition import check_cond
from pdfast.diffusion.schedules import Schedule
from pdfast.diffusion.step_table import angles
from pdfast_kernels import ddim_step

if TYPE_CHECKING:
    from jaxtyping import Float


@runtime_checkable
class Model(Protocol):
    """What is called as `model(z, phi, cond)`: a module or a function, with an attribute `prediction` or without."""

    def __call__(self, z: Tensor, phi: Tensor, cond: Any, /) -> Tensor: ...


def prediction_of(model: Model, said: Prediction | None = None) -> Prediction | None:
    """Return what a model predicts: as its attribute `prediction` has it, or as was said; None where neither is there.

    ValueError where they differ.
    """
    own = getattr(model, "prediction", None)
    if said is not None and own is not None and said != own:
        raise ValueError(f"prediction is {said!r}, but the model predicts {own!r}")
    return said if own is None else own


def check_model(name: str, model: Any) -> None:
    """Raise a TypeError for what cannot be called, or is a class in the place of a model."""
    if not callable(model) or isinstance(model, type):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"{name} is {what}: give a module, or a function, that is called as model(z, phi, cond)")


def _column(value: Tensor, z: Tensor) -> Tensor:
    return value.to(z).reshape(1, -1).expand(len(z), -1)


def _begin(
    model: Model, z: Tensor, phi: Tensor, cond: Any, prediction: Prediction | None
) -> tuple[Tensor, torch.dtype, Prediction]:
    """Return the state to compute with, the dtype that the model is given, and what it predicts. ValueError and TypeError
    for what cannot be sampled."""
    check_model("model", model)
    check_tensor("z", z)
    check_angles(phi)
    if phi.dim() != 1 or len(phi) < 2 or not bool((phi[1:] <= phi[:-1]).all()):  # nor NaN
        raise ValueError(f"phi of shape {tuple(phi.shape)}: give the angles of one trajectory, [steps + 1], decreasing")
    prediction = prediction_of(model, prediction)
    if prediction is None:
        raise ValueError("the model has no attribute `prediction`: say prediction=, what its outputs are")
    check_start(prediction, float(phi[0]), SMALLEST_SINE_TO_SAMPLE)
    check_cond(cond, len(z))
    return at_least_float32(z), z.dtype, prediction


def trajectory(
    model: Model,
    z: Float[Tensor, "n c *s"],
    phi: Float[Tensor, "angles"],
    *,
    order: int = 1,
    cond: Any = None,
    clip: bool = False,
    prediction: Prediction | None = None,
) -> Iterator[Float[Tensor, "n c *s"]]:
    """Yield the states at phi[1], phi[2], ... that a sampler reaches from z at phi[0]; one call of the model for each.

    order: 1 is DDIM, `ddim` has the other arguments. 2 extrapolates the x-predictions of this step and the one before linearly in the
    angle, to the middle of the step: the second-order multistep method of DPM-Solver++ (Lu et al. 2022) with the angle in place of the
    log-SNR, which is finite at both ends. It is for models of any number of steps: a student knows DDIM's steps alone.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (DDIM) or 2, got {order}")
    z, given, prediction = _begin(model, z, phi, cond, prediction)
    before: tuple[Tensor, Tensor] | None = None  # the step before: its length, and the x-prediction
    for here, there in zip(phi[:-1], phi[1:], strict=True):
        with torch.no_grad():
            output = model(z.to(given), here.to(z.device, torch.float32).expand(len(z)), cond)
            output = check_output("the model", output, z, prediction)
            if clip or order == 2:
                output = to_x(prediction, output, z, here.to(z))
                output = output.clamp(-1, 1) if clip else output
            if order == 2:
                x, length = output, here - there
                if before is not None:
                    output = x + (length / (2 * before[0])).to(z) * (x - before[1])
                before = length, x
            a, b = ddim_coefficients("x" if clip or order == 2 else prediction, here[None], (here - there)[None])
            z = ddim_step(z, output, _column(a, z)[:, 0], _column(b, z))
        yield z


def ddim(
    model: Model,
    z: Float[Tensor, "n c *s"],
    phi: Float[Tensor, "angles"],
    *,
    cond: Any = None,
    clip: bool = False,
    prediction: Prediction | None = None,
) -> Float[Tensor, "n c *s"]:
    """DDIM (Song et al. 2021) through the angles phi, float64 [steps + 1], decreasing; z is at phi[0], any angle.

    clip: clip each x-prediction to [-1, 1] and let eps follow, as the authors did in evaluation. prediction: of a model that does
    not say. Returns z at phi[-1], float32 or float64. TypeError where the model returns anything but a tensor of floats, ValueError for one
    of another shape.
    """
    *_, z = trajectory(model, z, phi, cond=cond, clip=clip, prediction=prediction)
    return z


def ancestral(
    model: Model,
    z: Float[Tensor, "n c *s"],
    phi: Float[Tensor, "angles"],
    noise: Callable[[int], Tensor],
    *,
    variance: float = 0.0,
    cond: Any = None,
    clip: bool = False,
    prediction: Prediction | None = None,
) -> Float[Tensor, "n c *s"]:
    """Ancestral sampling (Ho et al. 2020) through the angles phi, as `ddim`; `noise(i)` is the noise of step i, like z.

    variance: 0 is the smaller (posterior) variance, 1 the larger, between them the geometric interpolation of the paper's
    appendix ("medium"). The last step returns its mean.
    """
    if not 0 <= variance <= 1:
        raise ValueError(f"variance must be in [0, 1], got {variance}")
    z, given, prediction = _begin(model, z, phi, cond, prediction)
    with torch.no_grad():
        for i, (here, there) in enumerate(zip(phi[:-1], phi[1:], strict=True)):
            output = model(z.to(given), here.to(z.device, torch.float32).expand(len(z)), cond)
            output = check_output("the model", output, z, prediction)
            x = to_x(prediction, output, z, here.to(z)).to(z)
            if clip:
                x = x.clamp(-1, 1)
            if there == 0:
                z = x
                continue
            sin2, sin2_next = torch.sin(here) ** 2, torch.sin(there) ** 2
            cos, cos_next = torch.cos(here), torch.cos(there)
            # 1 - SNR(here) / SNR(there), by sin^2 a cos^2 b - cos^2 a sin^2 b = sin(a + b) sin(a - b)
            lost = torch.sin(here + there) * torch.sin(here - there) / (sin2 * cos_next**2)
            mean = (sin2_next * cos / (cos_next * sin2)).to(z) * z + (lost * cos_next).to(z) * x
            deviation = torch.sqrt(lost * sin2**variance * sin2_next ** (1 - variance))
            more = noise(i)
            check_tensor(f"noise({i})", more)
            if more.shape != z.shape:
                raise ValueError(f"noise({i}) has shape {tuple(more.shape)}, z has {tuple(z.shape)}: noise is like z")
            z = mean + deviation.to(z) * at_least_float32(more)
    return z


def sample(
    model: Model,
    z: Float[Tensor, "n c *s"],
    schedule: Schedule,
    steps: int,
    *,
    cond: Any = None,
    clip: bool = False,
    prediction: Prediction | None = None,
) -> Float[Tensor, "n c *s"]:
    """DDIM in `steps` steps from noise z [N, C, ...] ~ N(0, 1): images in about [-1, 1], same shape, float32 (float64 for such
    noise). The other arguments are those of `ddim`."""
    return ddim(model, z, angles(schedule, steps), cond=cond, clip=clip, prediction=prediction)
