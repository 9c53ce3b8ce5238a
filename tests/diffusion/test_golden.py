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
    Flow,
    LinearBeta,
    StartingAt,
    build_closure_table,
    build_step_table,
    ddim_coefficients,
    natural_angle,
    natural_weight,
    output_coefficient,
    outputs_per_channel,
    to_x,
)
from pdfast.loss import student_losses, teacher_outputs
from pdfast_kernels import weighted_loss

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


def says_in_turn(outputs, seen):
    """A network that says these, one a call, and keeps what it was asked."""
    outputs = iter(outputs)

    def network(z, phi, cond):
        seen.append((z, phi))
        return next(outputs)

    return network


def combined(coefficients, outputs):
    """The sum of each output's channels [n, P, ...] by coefficients [n, P]."""
    return sum((c[:, :, None] * output).sum(1) for c, output in zip(coefficients, outputs, strict=True))


def check_targets(build, times_of, prediction, k, precisions, weightings=WEIGHTINGS):
    """States, x-target and loss against the paper's, for rows k of the table that `build(weighting, dtype)` makes.

    z, x and eps are of order one, and errors of them absolute, but of the x of an eps in units of 1 / cos(phi); those of the loss
    are in units of its weight's bound.
    """
    channels = 2 if prediction == "both" else 1
    rng = np.random.default_rng(7)
    x, eps = rng.uniform(-1, 1, (len(k), ELEMENTS)), rng.standard_normal((len(k), ELEMENTS))
    student, *teacher = rng.uniform(-1, 1, (len(times_of(int(k[0]))[1]), len(k), channels, ELEMENTS))

    expected = {key: np.empty((len(k), ELEMENTS), object) for key in ("x_target", *weightings)}
    states = np.empty((len(teacher), len(k), ELEMENTS), object)
    for (row, i), e in itertools.product(enumerate(k.tolist()), range(ELEMENTS)):
        o, *outputs = (mpf(o[row, :, e] if channels == 2 else o[row, 0, e]) for o in (student, *teacher))
        schedule, times = times_of(i)
        sample = paper.Algorithm2(schedule, times, mpf(x[row, e]), mpf(eps[row, e]))
        for output in outputs:
            sample.teacher(prediction, output)
        states[:, row, e] = sample.states[: len(teacher)]
        expected["x_target"][row, e] = sample.x_target
        for weighting in weightings:
            expected[weighting][row, e] = sample.loss(prediction, o, weighting)

    for dtype, tolerance in precisions:
        z = torch.tensor([[float(v) for v in row] for row in states[0]], dtype=dtype)[:, None]
        o, *outputs = (torch.tensor(output, dtype=dtype) for output in (student, *teacher))
        for weighting in weightings:
            table = build(weighting, dtype)
            rows, index = table.rows(k), k - 1
            noised = torch.cos(rows.phi)[:, None] * torch.tensor(x, dtype=dtype)
            noised = noised + torch.sin(rows.phi)[:, None] * torch.tensor(eps, dtype=dtype)
            close(noised, states[0], tolerance)
            seen = []
            network = says_in_turn(outputs, seen)
            made = teacher_outputs(network, z, table, index, average=network if table.last_by_average else None)
            for (state, _), theirs in zip(seen, states, strict=True):
                close(state[:, 0], theirs, tolerance)

            # What the student is pulled to, as an output of its own.
            start = rows.target_z if table.parts == 2 else torch.ones_like(rows.target_z)
            target = combined((start[:, None], *rows.target_output[-2:]), made)
            natural, said = ("v", target) if prediction == "both" else (prediction, target / rows.output)
            x_target = to_x(natural, said[:, None], z, rows.phi)[:, 0].double()
            unit = 1 / torch.cos(rows.phi.double())[:, None] if prediction == "eps" else torch.ones(len(k), 1)
            close(x_target / unit, expected["x_target"] / unit.numpy().astype(object), tolerance)

            loss = torch.stack(
                [
                    student_losses(o[..., e : e + 1], *(part[..., e : e + 1] for part in made), table, index)
                    for e in range(ELEMENTS)
                ],
                dim=1,
            )
            unit = bound_of_weight(prediction, rows.phi.double())[:, None]
            close(loss.double() / unit, expected[weighting] / unit.numpy().astype(object), 4 * tolerance)


def precisions(N):
    """1e-13 in float64, and 1e-5 in float32 at 4096 steps."""
    return [(torch.float64, 1e-13)] + ([(torch.float32, 1e-5)] if N == 4096 else [])


@pytest.mark.parametrize("N", [1, 2, 3, 16, 4096])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_algorithm_2(prediction, name, N):
    ours, theirs = schedules(name, prediction)
    check_targets(
        lambda weighting, dtype: build_step_table(ours, N, prediction, weighting, dtype=dtype),
        lambda i: (theirs, paper.times_of_step(N, i)),
        prediction,
        torch.tensor(step_indices(N)),
        precisions(N),
    )


@pytest.mark.parametrize("N", [1, 4096])
@pytest.mark.parametrize("m", [3, 4, 8])
@pytest.mark.parametrize("name", ["cosine", "linear_beta"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_many_teacher_steps(prediction, name, m, N):
    """The target over m of them: where a formula subtracts, float32 loses it at 4096 steps of 8 parts."""
    ours, theirs = schedules(name, prediction)
    check_targets(
        lambda weighting, dtype: build_step_table(ours, N, prediction, weighting, factor=m, dtype=dtype),
        lambda i: (theirs, paper.times_of_step(N, i, m)),
        prediction,
        torch.tensor(step_indices(N)),
        precisions(N),
        ("truncated_snr",),
    )


@pytest.mark.parametrize("T, N", [(8, 2), (16, 1), (4096, 4)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_closure(prediction, T, N):
    """Both ends of segments: where the teacher's step ends one, the average says NaN, and the target is the teacher's."""
    ours, theirs = schedules("cosine", prediction)
    segment = T // N
    inside = torch.tensor([2, segment, (N - 1) * segment + segment // 2, T])
    check_targets(
        lambda weighting, dtype: build_closure_table(ours, T, N, prediction, weighting, dtype=dtype),
        lambda i: (theirs, paper.times_of_closure(T, N, i)),
        prediction,
        inside,
        precisions(T),
        ("truncated_snr",),
    )
    table = build_closure_table(ours, T, N, prediction, "snr_plus_one", dtype=torch.float64)
    assert len(table) == T and table.steps == N and table.last_by_average
    firsts = torch.arange(0, T, segment)  # of each segment, counted from 0
    z, o, first = torch.randn(3, len(firsts), outputs_per_channel(prediction), 5, dtype=torch.float64)
    z = z[:, :1]
    made = teacher_outputs(
        lambda *_: first, z, table, firsts, average=lambda state, phi, cond: torch.full_like(first, torch.nan)
    )
    losses = student_losses(first, *made, table, firsts)
    torch.testing.assert_close(losses, torch.zeros_like(losses), atol=1e-24, rtol=0)
    assert (student_losses(o, *made, table, firsts) > 0).all()
    assert all((angle > 0).all() for angle in table.angles[:-1])


def test_flow_is_an_euler_step():
    """In the flow's own time and state, y = (1 - t) x + t eps: y' = y + (t' - t) F, by rule of shifted times too."""
    z = torch.randn(6, 1, 3, dtype=torch.float64)
    F = torch.randn(6, 1, 3, dtype=torch.float64)
    for schedule in (Flow(), Flow(3.0), Cosine()):
        phi = schedule.phi(torch.tensor([1.0, 0.9, 0.5, 0.3, 0.05, 1e-3], dtype=torch.float64))
        psi = phi * torch.tensor([0.5, 0.999999, 0.2, 0.0, 0.9, 0.1], dtype=torch.float64)
        a, b = ddim_coefficients("flow", phi, phi - psi)
        scale, scale_next = (torch.cos(angle) + torch.sin(angle) for angle in (phi, psi))
        t, t_next = torch.sin(phi) / scale, torch.sin(psi) / scale_next
        euler = (z[:, 0].T / scale + (t_next - t) * F[:, 0].T).T * scale_next[:, None]
        torch.testing.assert_close(a[:, None] * z[:, 0] + b * F[:, 0], euler, atol=1e-14, rtol=1e-13)


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

    def teacher(z, phi, cond=None):
        out = network(z, phi.double()[:, None, None], torch)
        return torch.cat(out, 1) if prediction == "both" else out

    for N, i, m in [(4, 1, 2), (4, 3, 2), (64, 64, 2), (4, 1, 5), (64, 64, 3)]:
        sample = paper.Algorithm2(theirs, paper.times_of_step(N, i, m), mp.mpf(0.3), mp.mpf(-0.8))
        table = build_step_table(ours, N, prediction, "snr_plus_one", factor=m, dtype=torch.float64)
        index = torch.tensor([i - 1])
        for alpha, sigma in sample.levels[:-1]:
            # Networks are told angles in float32.
            angle = mp.mpf(float(torch.tensor(float(mp.atan2(sigma, alpha)), dtype=torch.float64).float()))
            sample.teacher(prediction, network(sample.states[-1], angle, mp))
        angle = mp.atan2(sample.levels[0][1], sample.levels[0][0])
        expected = sample.loss(prediction, network(sample.states[0], angle + 0.1, mp), "snr_plus_one")

        z = torch.tensor(float(sample.states[0]), dtype=torch.float64).view(1, 1, 1)
        made = teacher_outputs(teacher, z, table, index)
        loss = student_losses(teacher(z, table.rows(index + 1).phi + 0.1), *made, table, index)
        assert abs(mp.mpf(float(loss)) - expected) < 1e-12 * max(1, expected)


@pytest.mark.parametrize("schedule", [Cosine(), ClippedCosine(), LinearBeta(), AlphaBars(torch.from_numpy(DDPM))])
def test_eps_is_refused_from_pure_noise(schedule):
    with pytest.raises(ValueError, match="eps-prediction is singular at the start.*start below"):
        build_step_table(schedule, 8, "eps", "truncated_snr")
