"""Schedules: their ends, order and differences, against 60 digits."""

import mpmath as mp
import pytest
import torch

from pdfast.diffusion import (
    AlphaBars,
    ClippedCosine,
    Cosine,
    Flow,
    Karras,
    LinearBeta,
    StartingAt,
    angles,
    build_step_table,
    logsnr,
)

from .test_golden import SCHEDULES


def flow(u):
    t = 3 * u / (1 + 2 * u)
    norm = mp.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def karras(u):
    low, high = (mp.mpf(sigma) ** (mp.mpf(1) / 7) for sigma in (0.002, 80))
    sigma = (low + u * (high - low)) ** 7
    return 1 / mp.sqrt(1 + sigma**2), sigma / mp.sqrt(1 + sigma**2)


ALL = SCHEDULES | {"flow": (Flow(3.0), flow), "karras": (Karras(), karras)}


@pytest.mark.parametrize("N", [1000, 4096])
@pytest.mark.parametrize("u_start", [1.0, 0.9])
@pytest.mark.parametrize("name", ALL)
def test_angles_and_their_differences(name, u_start, N):
    ours, theirs = ALL[name]
    ours = StartingAt(ours, u_start)
    k = torch.tensor([1, 2, 3, N // 3, N // 2, N - 1, N], dtype=torch.float64)
    du = torch.tensor(1 / N, dtype=torch.float64)
    delta, phi = ours.delta(k / N, du), ours.phi(k / N)
    for i, j in enumerate(k.int().tolist()):
        high, low = (mp.atan2(*reversed(theirs(mp.mpf(n) / N * mp.mpf(u_start)))) for n in (j, j - 1))
        assert abs(mp.mpf(float(phi[i])) - high) < 1e-15 * 4
        assert abs(mp.mpf(float(delta[i])) / (high - low) - 1) < 5e-14


@pytest.mark.parametrize("name", SCHEDULES)
def test_monotone_from_data_to_noise(name):
    phi = SCHEDULES[name][0].phi(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert bool((phi.diff() > 0).all()) and phi[0] < 1e-4 and phi[-1] > 1.5


def test_cosine_ends_exactly():
    phi = Cosine().phi(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert phi[0] == 0 and torch.cos(phi[1]) < 1e-16


def test_clipped_logsnr():
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        logsnr(ClippedCosine().phi(u)), torch.tensor([20.0, 0.0, -20.0], dtype=torch.float64), atol=1e-10, rtol=0
    )


def test_another_default_device_changes_nothing():
    """As after torch.set_default_device("cuda"), of which meta stands for any."""
    alpha_bars = torch.cat([torch.ones(2), torch.linspace(0.9, 0.0, 6)]).double()

    def tables():
        schedule = AlphaBars(alpha_bars)
        return angles(schedule, 4), *build_step_table(schedule, 4, "v", "snr").columns()

    expected = tables()
    with torch.device("meta"):
        assert all(map(torch.equal, tables(), expected))


def test_a_sampler_ends_at_exactly_zero():
    for ours, _ in SCHEDULES.values():
        phi = angles(ours, 7)
        assert len(phi) == 8 and phi[-1] == 0 and phi.dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClippedCosine(3.0, 3.0),
        lambda: LinearBeta(2.0, 1.0),
        lambda: LinearBeta(0.0, 0.0),
        lambda: AlphaBars(torch.tensor([])),
        lambda: AlphaBars(torch.tensor([0.9, 0.9])),
        lambda: AlphaBars(torch.tensor([1.0, 0.9, 1.0, 0.5])),
        lambda: AlphaBars(torch.tensor([0.5, -0.1])),
        lambda: AlphaBars(torch.tensor([float("nan")])),
        lambda: Flow(0.0),
        lambda: Flow(float("inf")),
        lambda: Karras(sigma_min=0.0),
        lambda: Karras(sigma_min=3.0, sigma_max=2.0),
        lambda: Karras(rho=0.0),
        lambda: angles(Cosine(), 2.5),
        lambda: StartingAt(Cosine(), 0.0),
        lambda: StartingAt(Cosine(), 1.1),
        lambda: angles(Cosine(), 0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError):
        make()
