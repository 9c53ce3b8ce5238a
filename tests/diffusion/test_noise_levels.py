"""Angles from other measures of noise against diffusers' schedulers, and samplers of one's own against published ones."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import pdfast
from pdfast.diffusion import AlphaBars

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BARS = torch.from_numpy(np.cumprod(1 - BETAS))
PHI = torch.linspace(0.001, 1.57, 1000, dtype=torch.float64)
ENDS = torch.tensor([0.0, math.pi / 2], dtype=torch.float64)


def test_sigma_is_that_of_diffusers_and_edm():
    scheduler = EulerDiscreteScheduler(1000, trained_betas=list(BETAS))
    ours = pdfast.sigma_from_phi(pdfast.phi_from_alpha_bar(ALPHA_BARS)).flip(0)
    torch.testing.assert_close(ours, scheduler.sigmas[:-1].double(), rtol=1e-4, atol=0)
    karras = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    karras.set_timesteps(18)
    u = torch.arange(17, -1, -1, dtype=torch.float64) / 17
    ours = pdfast.sigma_from_phi(pdfast.Karras(0.01, 50.0, 5.0).phi(u))
    torch.testing.assert_close(ours, karras.sigmas[:-1].double(), rtol=1e-5, atol=0)


def test_alpha_bar_and_times_are_those_of_diffusers():
    scheduler = DDPMScheduler(1000, trained_betas=list(BETAS))
    phi = pdfast.phi_from_time(torch.arange(1000), ALPHA_BARS)
    torch.testing.assert_close(torch.cos(phi) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(phi, torch.acos(ALPHA_BARS.sqrt()), rtol=1e-12, atol=0)
    torch.testing.assert_close(pdfast.time_from_phi(phi, ALPHA_BARS), torch.arange(1000.0).double(), rtol=0, atol=1e-9)
    between = torch.tensor([-1.0, -0.25, 0.5, 998.75], dtype=torch.float64)
    torch.testing.assert_close(pdfast.time_from_phi(pdfast.phi_from_time(between, ALPHA_BARS), ALPHA_BARS), between)
    assert pdfast.phi_from_time(0.5, ALPHA_BARS) == pytest.approx(float(phi[:2].mean()))
    assert pdfast.phi_from_time(5000, ALPHA_BARS) == phi[-1] and pdfast.phi_from_time(-7, ALPHA_BARS) == 0
    assert pdfast.time_from_phi(1.57, ALPHA_BARS) == 999 and pdfast.time_from_phi(0.0, ALPHA_BARS) == -1
    torch.testing.assert_close(
        AlphaBars(ALPHA_BARS).phi((between + 1) / 1000), pdfast.phi_from_time(between, ALPHA_BARS)
    )
    with pytest.raises(ValueError, match="strictly decreasing"):
        pdfast.phi_from_time(3, ALPHA_BARS.flip(0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_those_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    times = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    phi = pdfast.phi_from_flow_time(times, shift)
    torch.testing.assert_close(pdfast.flow_time_from_phi(phi), scheduler.sigmas.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pdfast.flow_time_from_phi(phi, shift), times, rtol=1e-13, atol=0)
    torch.testing.assert_close(pdfast.Flow(shift).phi(times), phi, rtol=0, atol=0)
    assert pdfast.phi_from_flow_time(1.0, shift) == math.pi / 2 and pdfast.phi_from_flow_time(0, shift) == 0
    for function in (pdfast.phi_from_flow_time, pdfast.flow_time_from_phi):
        for wrong in (0.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="shift must be positive"):
                function(0.5, wrong)


def test_logsnr():
    alpha_bars = np.array([0.9, 0.5, 1e-3])
    phi = pdfast.phi_from_alpha_bar(torch.from_numpy(alpha_bars))
    np.testing.assert_allclose(pdfast.logsnr(phi), np.log(alpha_bars / (1 - alpha_bars)), atol=1e-14)
    infinite = torch.tensor([math.inf, -math.inf])
    assert torch.equal(pdfast.phi_from_logsnr(infinite), ENDS)


@pytest.mark.parametrize(
    "there, back",
    [
        (pdfast.sigma_from_phi, pdfast.phi_from_sigma),
        (pdfast.logsnr, pdfast.phi_from_logsnr),
        (pdfast.alpha_bar_from_phi, pdfast.phi_from_alpha_bar),
        (pdfast.flow_time_from_phi, pdfast.phi_from_flow_time),
    ],
)
def test_there_and_back(there, back):
    torch.testing.assert_close(back(there(PHI)), PHI, rtol=1e-9, atol=1e-12)
    assert back(there(1.0)).shape == () and back(there(1.0)) == pytest.approx(1.0)
    assert there(PHI.float()).dtype == torch.float64


OF_TIMES = torch.tensor([0.9, 0.5, 0.0])
RANGES = [
    (pdfast.phi_from_sigma, "sigma must be at least 0", [-1e-9, -math.inf], [0, math.inf]),
    (pdfast.phi_from_alpha_bar, r"alpha_bar must be in \[0, 1\]", [-0.1, 1.5], [0, 1]),
    (pdfast.phi_from_logsnr, "logsnr must be a number", [], [-math.inf, 3, math.inf]),
    (pdfast.phi_from_flow_time, r"t must be in \[0, 1\]", [2, -1e-9], [0, 1]),
    (lambda t: pdfast.phi_from_time(t, OF_TIMES), "t must be a number", [], [-math.inf, 0.5, math.inf]),
    *(
        (function, r"phi must be in \[0, pi/2\]", [-0.1, 1.6, math.inf], [0, math.pi / 2])
        for function in (
            pdfast.sigma_from_phi,
            pdfast.logsnr,
            pdfast.alpha_bar_from_phi,
            pdfast.flow_time_from_phi,
            lambda phi: pdfast.time_from_phi(phi, OF_TIMES),
        )
    ),
]


@pytest.mark.parametrize("function, message, outside, inside", RANGES)
def test_what_is_out_of_range_is_named(function, message, outside, inside):
    """As a number, and in a tensor; NaN where values are not asked, as on a GPU. The ends are no error, those of float32 neither."""
    for wrong in (*outside, math.nan):
        for value in (wrong, torch.tensor([[inside[0], wrong]]), torch.tensor(wrong, dtype=torch.float64)):
            with pytest.raises(ValueError, match=f"^{message}, got {wrong:g}$"):
                function(value)
    values = torch.tensor([*inside, *outside, math.nan])
    assert torch.vmap(function)(values).isnan().tolist() == [i >= len(inside) for i in range(len(values))]
    assert torch.equal(function(values[: len(inside)]), torch.vmap(function)(values[: len(inside)]))
    assert all(not function(value).isnan() for value in inside)
    with pytest.raises(TypeError, match=f"^{message.split()[0]} is a str: give a tensor"):
        function("0.5")


VARIANCE = 0.25


def denoised(y, sigma):
    """E[x | x + sigma eps] for normal x."""
    return VARIANCE / (VARIANCE + sigma**2) * y


def velocity(y, t):
    """E[eps - x | (1 - t) x + t eps] for normal x."""
    variance = (1 - t) ** 2 * VARIANCE + t**2
    return (t - (1 - t) * VARIANCE) / variance * y


def noise():
    return torch.randn(8, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_denoiser_of_edm_is_sampled_as_by_eulers_method():
    def model(z, phi, cond):
        phi = phi[:, None, None, None].double()
        return denoised(z / torch.cos(phi), torch.tan(phi))

    schedule = pdfast.Karras()
    sigmas = pdfast.sigma_from_phi(pdfast.angles(schedule, 12))
    y = noise() * sigmas[0]
    z = y * torch.cos(pdfast.angles(schedule, 12)[0])
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        y = y + (there - here) * (y - denoised(y, here)) / here
    ours = pdfast.sample(model, z, schedule, 12, prediction="x")
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-6)  # the model is told a float32 angle


def test_a_network_of_flow_matching_is_sampled_as_by_eulers_method():
    def model(z, phi, cond):
        t = pdfast.flow_time_from_phi(phi)[:, None, None, None]
        scale = (torch.cos(phi.double()) + torch.sin(phi.double()))[:, None, None, None]
        return velocity(z / scale, t)

    y, u = noise(), np.linspace(1, 0, 11)
    times = 3 * u / (1 + 2 * u)
    for here, there in zip(times[:-1], times[1:], strict=True):
        y = y + (there - here) * velocity(y, here)
    ours = pdfast.sample(model, noise(), pdfast.Flow(3.0), 10, prediction="flow")
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-6)


def test_times_of_betas_that_begin_with_0():
    """Several times without noise are one angle, whose time is the last of them."""
    alpha_bars = torch.tensor([1.0, 1.0, 0.9, 0.5], dtype=torch.float64)
    phi = pdfast.phi_from_time(torch.arange(4), alpha_bars)
    torch.testing.assert_close(torch.cos(phi) ** 2, alpha_bars)
    torch.testing.assert_close(pdfast.time_from_phi(phi, alpha_bars), torch.tensor([1.0, 1.0, 2.0, 3.0]).double())
