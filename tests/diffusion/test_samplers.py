"""Samplers against closed forms: a Gaussian whose exact predictions are known, and the paper's transition densities."""

import math

import numpy as np
import pytest
import torch

from pdfast.diffusion import (
    PREDICTIONS,
    Cosine,
    StartingAt,
    ancestral,
    angles,
    build_step_table,
    ddim,
    sample,
    to_v,
    to_x,
    trajectory,
)
from pdfast.loss import distillation_loss

from . import paper

MEAN, STD = 0.3, 0.5


class Gaussian:
    """The exact prediction for data N(MEAN, STD^2), every pixel by itself."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, z, phi, cond=None):
        cos, sin = (f(phi.double())[:, None, None, None] for f in (torch.cos, torch.sin))
        variance = cos**2 * STD**2 + sin**2
        x = MEAN + cos * STD**2 / variance * (z - cos * MEAN)
        eps = sin / variance * (z - cos * MEAN)
        said = paper.output(self.prediction, x, eps, cos, sin)
        return torch.cat(said, 1) if self.prediction == "both" else said


def draw(n=64):
    return torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_solves_the_probability_flow(prediction):
    """From any angle down to any other: the exact flow of a Gaussian is a map of standard scores, met to O(1/steps)."""
    z = draw()
    for start, end in [(1.3, 0.0), (0.9, 0.2)]:
        ours = ddim(Gaussian(prediction), z, torch.linspace(start, end, 4001, dtype=torch.float64))

        def moments(phi):
            return math.cos(phi) * MEAN, math.sqrt((math.cos(phi) * STD) ** 2 + math.sin(phi) ** 2)

        (m0, s0), (m1, s1) = moments(start), moments(end)
        torch.testing.assert_close(ours, m1 + s1 * (z - m0) / s0, atol=2e-3, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_student_is_two_steps_of_its_teacher(prediction):
    """A network that puts out the step table's target lands in one step where the teacher lands in two."""
    schedule = StartingAt(Cosine(), 0.9)
    teacher, z, N, k = Gaussian(prediction), draw(8), 5, 3
    rows = build_step_table(schedule, N, prediction, "snr_plus_one", dtype=torch.float64).rows(torch.full((8,), k))
    fine, coarse = angles(schedule, 2 * N), angles(schedule, N)
    two = ddim(teacher, z, fine[2 * (N - k) : 2 * (N - k) + 3])

    def column(c):
        return c.view(-1, *(1,) * 3)

    def mix(output, coefficient):
        return sum(column(coefficient[:, p]) * part for p, part in enumerate(output.chunk(coefficient.shape[1], 1)))

    def network(state, phi):
        return teacher(state, phi.float())  # as the sampler hands angles on

    first = network(z, rows.phi)
    z_mid = column(rows.step_z[0]) * z + mix(first, rows.step_output[0])
    target = column(rows.target_z) * z + mix(first, rows.target_output[0])
    target = target + mix(network(z_mid, rows.angles[1]), rows.target_output[1])
    if prediction == "flow":
        target = target * math.sqrt(2)  # the point at theta, as an output

    class Student:
        def __init__(self):
            self.prediction = "v" if prediction == "both" else prediction

        def __call__(self, z, phi, cond=None):
            return target

    torch.testing.assert_close(ddim(Student(), z, coarse[N - k : N - k + 2]), two, atol=1e-12, rtol=0)


def test_clipping():
    """x-predictions are clipped to [-1, 1] and eps follows, as written in the authors' sampler."""
    z, phi = 3 * draw(), angles(Cosine(), 6)
    ours = ddim(Gaussian("v"), z, phi, clip=True)
    state = z.numpy()
    for here, there in zip(phi[:-1].tolist(), phi[1:].tolist(), strict=True):
        out = Gaussian("x")(torch.from_numpy(state), torch.full((len(z),), here)).numpy()
        x = np.clip(out, -1, 1)
        eps = (state - math.cos(here) * x) / math.sin(here)
        state = math.cos(there) * x + math.sin(there) * eps
    np.testing.assert_allclose(ours.numpy(), state, atol=1e-6)
    assert not torch.allclose(ours, ddim(Gaussian("v"), z, phi))


@pytest.mark.parametrize("variance", [0.0, 0.4, 1.0])
def test_ancestral_steps(variance):
    """Mean and variance of q(z_s | z_t, x) as the paper's code writes them in log-SNR; the last step returns its mean."""
    z, phi = draw(), torch.tensor([1.2, 0.8], dtype=torch.float64)
    noises = draw(64).flip(0)
    t, s = phi.tolist()
    snr_t, snr_s = (1 / math.tan(a) ** 2 for a in (t, s))
    r = snr_t / snr_s
    x = Gaussian("x")(z, torch.full((64,), t, dtype=torch.float32))
    mean = r * (math.cos(s) / math.cos(t)) * z + (1 - r) * math.cos(s) * x
    low, high = (1 - r) * math.sin(s) ** 2, (1 - r) * math.sin(t) ** 2
    expected = mean + math.exp(0.5 * (variance * math.log(high) + (1 - variance) * math.log(low))) * noises
    ours = ancestral(Gaussian("x"), z, phi, lambda i: noises, variance=variance)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    last = torch.tensor([0.8, 0.0], dtype=torch.float64)
    x = Gaussian("x")(z, torch.full((64,), 0.8, dtype=torch.float64).float())
    torch.testing.assert_close(ancestral(Gaussian("v"), z, last, lambda i: noises), x, atol=1e-6, rtol=0)


def test_ancestral_draws_the_data():
    z = draw(4000)
    generator = torch.Generator().manual_seed(1)
    x = ancestral(
        Gaussian("both"), z, angles(Cosine(), 200), lambda i: torch.randn(z.shape, dtype=z.dtype, generator=generator)
    )
    assert abs(float(x.mean()) - MEAN) < 0.02 and abs(float(x.std()) - STD) < 0.02


def test_errors():
    with pytest.raises(ValueError, match="eps-prediction"):
        sample(Gaussian("eps"), draw(), Cosine(), 4)
    with pytest.raises(ValueError, match="variance"):
        ancestral(Gaussian("x"), draw(), angles(Cosine(), 4), lambda i: draw(), variance=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("network_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_state_is_float32_whatever_noise_and_network_are(dtype, network_dtype):
    """More steps do not take the images further from those of float64 noise; in 16 bits they would."""
    gaussian, errors = Gaussian("v"), []

    def network(z, phi, cond):
        assert z.dtype == dtype and phi.dtype == torch.float32
        return gaussian(z, phi).to(network_dtype)

    for steps in (4, 64):
        noise = draw().to(dtype)
        images = sample(network, noise, Cosine(), steps, prediction="v")
        assert images.dtype == torch.float32
        exact = sample(gaussian, noise.double(), Cosine(), steps)
        assert exact.dtype == torch.float64
        errors.append(float((images - exact).square().mean().sqrt()))
    assert errors[1] < errors[0] < 2e-3
    noises = torch.randn(64, 64, 1, 2, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = ancestral(network, draw().to(dtype), angles(Cosine(), 64), noises.__getitem__, prediction="v")
    exact = ancestral(gaussian, draw().to(dtype).double(), angles(Cosine(), 64), noises.double().__getitem__)
    assert ours.dtype == torch.float32 and float((ours - exact).square().mean().sqrt()) < 1e-3


@pytest.mark.parametrize("shape", [(), (64,)], ids=["one angle", "an angle each"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_an_output_means_is_computed_in_float32(prediction, shape):
    z, phi = draw().to(torch.bfloat16), torch.full(shape, 1.0)
    output = Gaussian(prediction)(z, phi.expand(64)).to(torch.bfloat16)
    for meaning in (to_x, to_v):
        ours = meaning(prediction, output, z, phi)
        assert ours.dtype == torch.float32
        exact = meaning(prediction, output.double(), z.double(), phi.double())
        torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-6)
        with pytest.raises(TypeError, match="angles of dtype torch.bfloat16"):
            meaning(prediction, output, z, phi.to(torch.bfloat16))


def test_what_cannot_be_sampled_is_refused():
    v, z, phi = Gaussian("v"), draw(), angles(Cosine(), 4)
    for arguments, words in (
        ((v, z, phi.flip(0)), "decreasing"),
        ((v, z, phi[:1]), "steps \\+ 1"),
        ((v, z, torch.full_like(phi, math.nan)), "decreasing"),
        ((v, z, phi.expand(2, 5)), "one trajectory"),
        ((Gaussian("epsilon"), z, phi), "unknown prediction 'epsilon'"),
        ((lambda z, phi, cond: z, z, phi), "say prediction="),
    ):
        with pytest.raises(ValueError, match=words):
            ddim(*arguments)
    with pytest.raises(ValueError, match="'x', but the model predicts 'v'"):
        ddim(v, z, phi, prediction="x")
    with pytest.raises(ValueError, match="cond has shape .3,.: there are 64 samples"):
        sample(v, z, Cosine(), 4, cond=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="angles of dtype torch.float16"):
        ddim(v, z, phi.half())
    with pytest.raises(TypeError, match="states of dtype torch.int64"):
        ddim(v, z.long(), phi)
    with pytest.raises(TypeError, match="z is a list: give a tensor"):
        ddim(v, [z], phi)
    with pytest.raises(TypeError, match="phi is a Cosine: give a tensor"):
        ddim(v, z, Cosine())
    with pytest.raises(ValueError, match=r"noise\(0\) has shape \(1, 1, 2, 2\), z has"):
        ancestral(v, z, phi, lambda i: z[:1])


class Output(dict):
    """As diffusers' own: a tensor by its name."""


RETURNED = [
    (TypeError, "a tuple: let it return the tensor alone", lambda z: (z,)),
    (TypeError, "a Output: let it return the tensor alone, such as output.0., or output.sample", lambda z: Output(sample=z)),
    (TypeError, "a NoneType", lambda z: None),
    (TypeError, "a tensor of dtype torch.int64: let it return floats", torch.Tensor.long),
    (ValueError, r"shape \(64, 2, 2, 2\): of z \(64, 1, 2, 2\), prediction 'v' is \(64, 1, 2, 2\)", lambda z: torch.cat([z, z], 1)),
    (ValueError, r"shape \(1, 1, 2, 2\)", lambda z: z[:1]),
    (ValueError, "a tensor on meta, z is on cpu", lambda z: z.to("meta")),
]  # fmt: skip


@pytest.mark.parametrize("error, words, returned", RETURNED, ids=[words for _, words, _ in RETURNED])
def test_a_model_that_returns_something_else_is_named(error, words, returned):
    def model(z, phi, cond):
        return returned(z)

    z, phi = draw(), angles(Cosine(), 4)
    for call in (
        lambda: ddim(model, z, phi, prediction="v"),
        lambda: ddim(model, z, phi, prediction="v", clip=True),
        lambda: sample(model, z, Cosine(), 1, prediction="v"),
        lambda: ancestral(model, z, phi, lambda i: z, prediction="v"),
    ):
        with pytest.raises(error, match=f"^the model returned {words}") as caught:
            call()
        assert "\n" not in str(caught.value)
    table = build_step_table(Cosine(), 4, "v", "snr")
    for name, models in (("student", (model, Gaussian("v"))), ("teacher", (Gaussian("v"), model))):
        with pytest.raises(error, match=f"^the {name} returned {words}"):
            distillation_loss(*models, z.float(), table)


@pytest.mark.parametrize(
    "schedule, words", [("cosine", "a str: give an instance such as Cosine"), (Cosine, "the class Cosine: give an instance, Cosine"), (None, "a NoneType")]
)  # fmt: skip
def test_what_is_no_schedule_is_named(schedule, words):
    for call in (
        lambda: build_step_table(schedule, 4, "v", "snr"),
        lambda: angles(schedule, 4),
        lambda: sample(Gaussian("v"), draw(), schedule, 4),
        lambda: StartingAt(schedule, 0.9),
    ):
        with pytest.raises(TypeError, match=f"^schedule is {words}"):
            call()


@pytest.mark.parametrize("model, words", [("model", "a str"), (Gaussian, "the class Gaussian"), (None, "a NoneType")])
def test_what_is_no_model_is_named(model, words):
    x, table = draw().float(), build_step_table(Cosine(), 4, "v", "snr")
    for name, call in (
        ("model", lambda: sample(model, x, Cosine(), 4, prediction="v")),
        ("student", lambda: distillation_loss(model, Gaussian("v"), x, table)),
        ("teacher", lambda: distillation_loss(Gaussian("v"), model, x, table)),
    ):
        with pytest.raises(TypeError, match=f"^{name} is {words}: give a module, or a function"):
            call()


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p != "eps"])
def test_second_order(prediction):
    """Data of one Gaussian, where the flow's end is known: of second order up to a logarithm, where DDIM is of the first."""
    model, z = Gaussian(prediction), torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    errors = {}
    for order in (1, 2):
        for steps in (64, 256):
            *states, end = trajectory(model, z, angles(Cosine(), steps), order=order)
            assert len(states) == steps - 1
            errors[order, steps] = float((end - (MEAN + STD * z)).abs().max())
    assert errors[1, 64] / errors[1, 256] == pytest.approx(4, rel=0.2)
    assert errors[2, 64] / errors[2, 256] > 8 and errors[2, 64] < 0.1 * errors[1, 64]
    with pytest.raises(ValueError, match="order must be 1"):
        next(trajectory(model, z, angles(Cosine(), 4), order=3))
