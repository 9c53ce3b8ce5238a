"""The step table and the linear operations against the paper's formulas at 60 digits."""

import itertools

import mpmath as mp
import numpy as np
import pytest
import torch

from pdfast.diffusion import (
    PREDICTIONS,
    WEIGHTINGS,
    AlphaBars,
    ClippedCosine,
    Cosine,
    LinearBeta,
    StartingAt,
    build_step_table,
    natural_angle,
    natural_weight,
    output_coefficient,
    to_x,
)
from pdfast_kernels import ddim_step, ddim_step_weighted_loss, weighted_loss

from . import paper

DDPM = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
IRREGULAR = np.array([0.97, 0.9, 0.71, 0.7, 0.31, 0.08, 0.004])
SCHEDULES = {
    "cosine": (Cosine(), paper.cosine),
    "clipped_cosine": (ClippedCosine(), paper.clipped_cosine),
    "linear_beta": (LinearBeta(), paper.linear_beta),
    "ddpm_table": (AlphaBars(torch.from_numpy(DDPM)), paper.table(DDPM)),
    "irregular_table": (AlphaBars(torch.from_numpy(IRREGULAR)), paper.table(IRREGULAR)),
}
U_START_FOR_EPS = 0.9
ELEMENTS = 2


def schedules(name, prediction):
    ours, theirs = SCHEDULES[name]
    if prediction == "eps":
        return StartingAt(ours, U_START_FOR_EPS), paper.starting_at(theirs, U_START_FOR_EPS)
    return ours, theirs


def step_indices(N):
    return sorted({1, min(2, N), (N + 1) // 2, max(N - 1, 1), N})


def mpf(value):
    return [mp.mpf(float(v)) for v in value] if value.ndim else mp.mpf(float(value))


def bound_of_weight(prediction, phi):
    """The largest weight a squared error of the network's own output can have: the loss is measured in this unit."""
    return {"x": 1 / torch.sin(phi) ** 2, "eps": 1 / torch.cos(phi) ** 2}.get(prediction, torch.ones_like(phi))


@pytest.mark.parametrize("N", [1, 2, 3, 16, 4096])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_algorithm_2(prediction, name, N):
    """z_mid, x-target and loss of every weighting: 1e-13 in float64, and 1e-5 in float32 at 4096 steps.

    z and x are of order one, and errors of them absolute; those of the loss are in units of its weight's bound.
    """
    ours, theirs = schedules(name, prediction)
    k = torch.tensor(step_indices(N))
    channels = 2 if prediction == "both" else 1
    rng = np.random.default_rng(7)
    x = rng.uniform(-1, 1, (len(k), ELEMENTS))
    eps = rng.standard_normal((len(k), ELEMENTS))
    first, second, student = rng.uniform(-1, 1, (3, len(k), channels, ELEMENTS))

    expected = {key: np.empty((len(k), ELEMENTS), object) for key in ("z", "z_mid", "x_target", *WEIGHTINGS)}
    for (row, i), e in itertools.product(enumerate(k.tolist()), range(ELEMENTS)):
        o1, o2, o = (
            mpf(output[row, :, e] if channels == 2 else output[row, 0, e]) for output in (first, second, student)
        )
        sample = paper.Algorithm2(theirs, N, i, mpf(x[row, e]), mpf(eps[row, e]))
        expected["z"][row, e] = sample.z
        expected["z_mid"][row, e] = sample.teacher_first(prediction, o1)
        expected["x_target"][row, e] = sample.teacher_second(prediction, o2)
        for weighting in WEIGHTINGS:
            expected[weighting][row, e] = sample.loss(prediction, o, weighting)

    for dtype, tolerance in [(torch.float64, 1e-13)] + ([(torch.float32, 1e-5)] if N == 4096 else []):
        z = torch.tensor([[float(v) for v in row] for row in expected["z"]], dtype=dtype)[:, None]
        o1, o2, o = (torch.tensor(output, dtype=dtype) for output in (first, second, student))
        for weighting in WEIGHTINGS:
            rows = build_step_table(ours, N, prediction, weighting, dtype=dtype).rows(k)
            noised = torch.cos(rows.phi)[:, None] * torch.tensor(x, dtype=dtype)
            noised = noised + torch.sin(rows.phi)[:, None] * torch.tensor(eps, dtype=dtype)
            close(noised, expected["z"], tolerance)
            z_mid = ddim_step(z, o1, rows.ddim_z, rows.ddim_output)
            close(z_mid[:, 0], expected["z_mid"], tolerance)

            # The natural target as an output of its own: what the student is pulled to.
            target = ddim_step(z, o1, rows.target_z, rows.target_output)
            target = target + ddim_step(torch.zeros_like(z), o2, rows.weight, rows.target_output_mid)
            natural = "v" if prediction == "both" else prediction
            close(to_x(natural, target, z, rows.phi)[:, 0], expected["x_target"], tolerance)

            loss = torch.stack(
                [
                    ddim_step_weighted_loss(
                        o[..., e : e + 1], z[..., e : e + 1], o1[..., e : e + 1], o2[..., e : e + 1],
                        rows.target_z, rows.target_output, rows.target_output_mid, rows.output, rows.weight,
                    )
                    for e in range(ELEMENTS)
                ],
                dim=1,
            )  # fmt: skip
            unit = bound_of_weight(prediction, rows.phi.double())[:, None]
            close(loss.double() / unit, expected[weighting] / unit.numpy().astype(object), 4 * tolerance)


def close(ours, theirs, tolerance):
    """Each difference, taken at 60 digits, is at most the tolerance times max(1, |expected|)."""
    for a, b in zip(ours.double().flatten().tolist(), theirs.flatten(), strict=True):
        assert abs(mp.mpf(a) - b) <= tolerance * max(1, abs(b)), f"{a} is not {mp.nstr(b, 20)}"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_algorithm_1(prediction, name, weighting):
    """The teacher's loss at random times: w(lambda) |x - x_hat|^2, in units of its weight's bound."""
    ours, theirs = schedules(name, prediction)
    rng = np.random.default_rng(11)
    u = rng.uniform(0.01, 1, 6)
    x, eps = rng.uniform(-1, 1, 6), rng.standard_normal(6)
    output = rng.uniform(-1, 1, (6, 2 if prediction == "both" else 1))

    expected = []
    for i in range(6):
        alpha, sigma = theirs(mp.mpf(u[i]))
        z = alpha * mp.mpf(x[i]) + sigma * mp.mpf(eps[i])
        o = mpf(output[i]) if prediction == "both" else mp.mpf(output[i, 0])
        expected.append(
            paper.weight(weighting, alpha, sigma) * (mp.mpf(x[i]) - paper.x_hat(prediction, o, z, alpha, sigma)) ** 2
        )

    phi = ours.phi(torch.tensor(u))
    angle = natural_angle(prediction, phi)
    target = torch.cos(angle) * torch.tensor(x) + torch.sin(angle) * torch.tensor(eps)
    loss = weighted_loss(
        torch.tensor(output)[..., None],
        target[:, None, None],
        output_coefficient(prediction, phi),
        natural_weight(prediction, weighting, phi),
    )
    unit = bound_of_weight(prediction, phi)
    close(loss / unit, np.array(expected, object) / unit.numpy().astype(object), 1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_a_network(prediction):
    """Both evaluations of the teacher by a function of (z, phi), the paper's loop against ours, to 1e-12."""
    ours, theirs = schedules("cosine", prediction)

    def network(z, phi, lib):
        value = [lib.sin(2 * z + phi), lib.cos(z - phi)]
        return value if prediction == "both" else value[0]

    for N, i in [(4, 1), (4, 3), (64, 64)]:
        sample = paper.Algorithm2(theirs, N, i, mp.mpf(0.3), mp.mpf(-0.8))
        angle = mp.atan2(sample.sigma, sample.alpha)
        z1 = sample.teacher_first(prediction, network(sample.z, angle, mp))
        sample.teacher_second(prediction, network(z1, mp.atan2(sample.sigma1, sample.alpha1), mp))
        expected = sample.loss(prediction, network(sample.z, angle + 0.1, mp), "snr_plus_one")

        rows = build_step_table(ours, N, prediction, "snr_plus_one", dtype=torch.float64).rows(torch.tensor([i]))

        def ours_at(z, phi):
            out = network(z, phi[:, None, None], torch)
            return torch.cat(out, 1) if prediction == "both" else out

        z = torch.tensor(float(sample.z), dtype=torch.float64).view(1, 1, 1)
        o1 = ours_at(z, rows.phi)
        o2 = ours_at(ddim_step(z, o1, rows.ddim_z, rows.ddim_output), rows.phi_mid)
        loss = ddim_step_weighted_loss(
            ours_at(z, rows.phi + 0.1), z, o1, o2,
            rows.target_z, rows.target_output, rows.target_output_mid, rows.output, rows.weight,
        )  # fmt: skip
        assert abs(mp.mpf(float(loss)) - expected) < 1e-12 * max(1, expected)


@pytest.mark.parametrize("schedule", [Cosine(), ClippedCosine(), LinearBeta(), AlphaBars(torch.from_numpy(DDPM))])
def test_eps_is_refused_from_pure_noise(schedule):
    with pytest.raises(ValueError, match="eps-prediction is singular at the start.*start below"):
        build_step_table(schedule, 8, "eps", "truncated_snr")
