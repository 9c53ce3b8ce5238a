"""The noise schedules of diffusers' schedulers: those that the classes themselves compute, or a refusal."""

import functools
import itertools
import json
import math
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from pdfast.diffusers_tables import DISCRETE
from pdfast.diffusion import build_step_table, sample
from pdfast.diffusion.schedules import AlphaBars
from pdfast.io.errors import UsageError
from pdfast.pretrained import adapt, load_pipeline
from pdfast.pretrained.model_folder import fill_model_folder, load_model
from pdfast.schedule_config import ScheduleConfig
from tests.data.errors import refusal
from tests.pretrained.pipelines import drawn_by_diffusers, save, unet
from tests.pretrained.test_edm import write as write_edm

CPU = torch.device("cpu")
BETAS = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "from 0": {"beta_start": 0.0},
    "from almost 0": {"beta_start": 1e-9},
    "trained": {"num_train_timesteps": 40, "trained_betas": [0.01 + 0.02 * i for i in range(40)]},
    "trained from 0": {"num_train_timesteps": 40, "trained_betas": [0.0, 0.0] + [0.02 * i for i in range(1, 39)]},
}
TIMES = [
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1, "num_train_timesteps": 100},
    {"timestep_spacing": "linspace", "num_train_timesteps": 37},
]


def make(name, given):
    """The scheduler, None where there is none of that class and these settings."""
    try:
        return getattr(diffusers, name).from_config(given)
    except (NotImplementedError, ValueError):
        return None


def expected_table(scheduler):
    """What the class computes; its stand-in for 0 at the end where that would not be below the one before."""
    table = scheduler.alphas_cumprod.double()
    if scheduler.config.get("rescale_betas_zero_snr") and len(table) > 1 and table[-1] >= table[-2]:
        assert table[-1] == 2**-24
        table[-1] = 0
    return table


@pytest.mark.parametrize("name", DISCRETE)
def test_the_table_is_that_of_the_class(name):
    """Over the classes, the betas, both rescalings and the settings of times, at all times of the table."""
    seen, network = 0, unet()
    for betas, rescale, times in itertools.product(BETAS, (False, True), TIMES):
        if "trained" in betas and "num_train_timesteps" in times:
            continue
        given = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": rescale} | BETAS[betas] | times
        theirs = make(name, given)
        if theirs is None:
            assert betas in ("sigmoid", "laplace")
            continue
        table = expected_table(theirs)
        if not (table[1:] < table[:-1]).logical_or(table[1:] == 1).all():
            with pytest.raises(UsageError, match="strictly decreasing"):
                adapt(network, theirs)
            continue
        adapted, schedule = adapt(network, theirs)
        phi = torch.atan2(torch.sqrt(1 - table), torch.sqrt(table))
        assert torch.equal(adapted.label(phi.float())[phi > 0].round(), torch.arange(len(table))[phi > 0].float())
        u = torch.arange(1, len(table) + 1, dtype=torch.float64) / len(table)
        torch.testing.assert_close(schedule.phi(u)[phi > 0], phi[phi > 0], rtol=1e-12, atol=1e-12)
        assert schedule.phi(u).diff().min() > 0
        seen += 1
    assert seen >= 20


SWAPS = [
    (
        DDIMScheduler(rescale_betas_zero_snr=True, beta_schedule="scaled_linear", prediction_type="v_prediction"),
        PNDMScheduler,
    ),
    (DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True), PNDMScheduler),
    (PNDMScheduler(num_train_timesteps=500, prediction_type="v_prediction"), DDIMScheduler),
    (PNDMScheduler(beta_schedule="scaled_linear"), UniPCMultistepScheduler),
    (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"), DPMSolverMultistepScheduler),
    (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"), UniPCMultistepScheduler),
]


@pytest.mark.parametrize("first, second", SWAPS)
def test_a_scheduler_in_the_place_of_another(first, second, tmp_path):
    """Made of another's configuration, in memory and in the folder whose model_index.json names it."""
    theirs = second.from_config(first.config)
    _, schedule = adapt(unet(), theirs)
    save(tmp_path / "swapped", theirs)
    save(tmp_path / "named", first)
    index = tmp_path / "named/model_index.json"
    index.write_text(index.read_text().replace(type(first).__name__, second.__name__))
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    table = expected_table(theirs)
    for other in (load_pipeline(tmp_path / name)[1].build() for name in ("swapped", "named")):
        assert torch.equal(other.phi(u), schedule.phi(u))
    torch.testing.assert_close(torch.cos(schedule.phi(u[-1:])) ** 2, table[-1:], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "betas, prediction",
    [
        ("from 0", "v_prediction"),
        ("from almost 0", "sample"),
        ("trained from 0", "sample"),
    ],
)
def test_ddim_from_betas_that_begin_with_0(betas, prediction, tmp_path):
    """The images of diffusers' own DDIM, and rounds at all step counts."""
    scheduler = DDIMScheduler(**BETAS[betas], prediction_type=prediction)
    theirs = save(tmp_path, scheduler)
    network, schedule = load_pipeline(tmp_path)
    noise = torch.randn(2, 1, 8, 8)
    for steps in (4, 8, 10):
        x = drawn_by_diffusers(theirs, scheduler, noise, steps)
        ours = sample(network, noise, schedule.build(), steps)
        assert (ours - x).abs().max() < 1e-4 * x.abs().max().clamp(min=1)
    times = scheduler.config.num_train_timesteps
    assert sample(network, noise, schedule.build(), 2 * times if times < 100 else 50).isfinite().all()
    table = build_step_table(schedule.build(), 2 * times, network.prediction, "truncated_snr", dtype=torch.float64)
    assert all(column.isfinite().all() for column in table.columns())


def test_a_table_of_alpha_bars_that_begins_with_1():
    schedule = AlphaBars(torch.tensor([1.0, 1.0, 0.9, 0.5, 0.0]).double())
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert schedule.phi(u).diff().min() > 0 and schedule.phi(u[:1]) == 0
    assert torch.cos(schedule.phi(torch.tensor(0.6).double())) ** 2 == pytest.approx(0.9)
    du = torch.tensor(0.25, dtype=torch.float64)
    later = u[u >= 0.25]
    torch.testing.assert_close(schedule.delta(later, du), schedule.phi(later) - schedule.phi(later - du))
    with pytest.raises(ValueError, match="strictly decreasing"):
        AlphaBars(torch.tensor([1.0, 1.0]))


@contextmanager
def changed(file, **values):
    """With other values in a JSON file."""
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | values))
    yield
    file.write_text(before)


HUGE = 10**9
BAD_DISCRETE = [
    {"num_train_timesteps": 0},
    {"num_train_timesteps": -1},
    {"num_train_timesteps": HUGE},
    {"num_train_timesteps": "1000"},
    {"num_train_timesteps": 10.5},
    {"num_train_timesteps": True},
    {"prediction_type": ["epsilon"]},
    {"prediction_type": {}},
    {"prediction_type": None},
    {"prediction_type": "flow_prediction"},
    {"num_train_timesteps": None},
    {"beta_start": None},
    {"beta_schedule": None},
    {"rescale_betas_zero_snr": None},
    {"_class_name": "EulerDiscreteScheduler"},
    {"_class_name": "EDMEulerScheduler"},
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    {"_class_name": "LCMScheduler"},
    {"_class_name": ["DDIMScheduler"]},
    {"beta_start": "0.1"},
    {"beta_start": math.nan},
    {"beta_end": math.inf},
    {"beta_end": 1.5},
    {"beta_start": -0.1},
    {"beta_schedule": ["linear"]},
    {"trained_betas": "0.1"},
    {"trained_betas": [[0.1]]},
    {"trained_betas": [0.1, None]},
    {"trained_betas": [0.0, 0.0]},
    {"trained_betas": []},
    {"trained_betas": [0.1, math.nan]},
    {"rescale_betas_zero_snr": "yes"},
    {"use_flow_sigmas": True},
]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler])
def test_no_schedule(scheduler, tmp_path):
    save(tmp_path, scheduler(100, prediction_type="v_prediction"))
    for values in BAD_DISCRETE:
        with changed(tmp_path / "scheduler/scheduler_config.json", **values):
            if scheduler is DDIMScheduler and "use_flow_sigmas" in values:
                load_pipeline(tmp_path)  # it has no such argument
            else:
                message = refusal(load_pipeline, tmp_path, names=tmp_path)
                assert "scheduler" in message and (None not in values.values() or next(iter(values)) in message), values


def test_a_scheduler_that_is_not_read_is_refused_with_the_reason(tmp_path):
    """By the class that model_index.json names, as by that of scheduler_config.json under one that is read."""
    save(tmp_path, DDIMScheduler(100, prediction_type="v_prediction"))
    for name, reason in (
        ("FlowMatchHeunDiscreteScheduler", "not read yet"),
        ("LCMScheduler", "distilled already"),
        ("TCDScheduler", "no teacher"),
    ):
        with changed(tmp_path / "scheduler/scheduler_config.json", _class_name=name):
            message = refusal(load_pipeline, tmp_path, names=tmp_path)
            assert f"its scheduler_config.json is of '{name}'" in message and reason in message
        with changed(tmp_path / "model_index.json", scheduler=["diffusers", name]):
            message = refusal(load_pipeline, tmp_path, names=tmp_path)
            assert f"is a '{name}'" in message and f"{reason}" in message and "choose one of DDPMScheduler" in message
    with pytest.raises(UsageError, match="is a 'LCMScheduler' .a student that was distilled already"):
        adapt(unet(), diffusers.LCMScheduler())
    with changed(tmp_path / "scheduler/scheduler_config.json", _class_name=None):
        load_pipeline(tmp_path)  # as of one that was written by hand


BAD_SIGMAS = [
    {"sigma_min": 0},
    {"sigma_min": -0.1},
    {"sigma_min": math.nan},
    {"sigma_min": "0.1"},
    {"sigma_min": 90},
    {"sigma_min": True},
    {"sigma_max": math.inf},
    {"sigma_max": math.nan},
    {"sigma_max": 0.002},
    {"sigma_max": 10**400},
    {"sigma_data": 0},
    {"sigma_data": -0.5},
    {"sigma_data": math.nan},
    {"sigma_data": None},
    {"sigma_max": None},
    {"prediction_type": "sample"},
    {"prediction_type": ["epsilon"]},
    {"prediction_type": None},
]


def names_what_is_wrong(load, folder, values):
    """Of numbers that JSON does not have at least the file."""
    message = refusal(load, folder, names=folder)
    assert next(iter(values)) in message or "number" in message


def test_no_schedule_of_edm(tmp_path):
    save(tmp_path, EDMEulerScheduler())
    with changed(tmp_path / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"):
        assert "is of 'DDIMScheduler'" in refusal(load_pipeline, tmp_path, names=tmp_path)
    for values in BAD_SIGMAS:
        with changed(tmp_path / "scheduler/scheduler_config.json", **values):
            names_what_is_wrong(load_pipeline, tmp_path, values)
    assert load_pipeline(tmp_path)[0].prediction == "v"
    for values in BAD_SIGMAS[:9]:  # as objects, where NaN is a number
        scheduler = EDMEulerScheduler()
        scheduler.register_to_config(**values)
        with pytest.raises(UsageError, match=next(iter(values))):
            adapt(unet(), scheduler)


BAD_LIMITS = [
    {"sigma_min": -0.1},
    {"sigma_min": math.nan},
    {"sigma_min": math.inf},
    {"sigma_min": 90},
    {"sigma_max": 0.001},
    {"sigma_max": -1},
    {"sigma_max": math.nan},
    {"sigma_data": 0},
    {"sigma_data": -0.5},
    {"sigma_data": math.nan},
    {"sigma_data": math.inf},
]


def test_no_noise_of_edms_authors(tmp_path):
    folder = write_edm(tmp_path / "teacher")
    kwargs = json.loads((folder / "config.json").read_text())["init_kwargs"]
    for values in BAD_LIMITS:
        with changed(folder / "config.json", init_kwargs=kwargs | values):
            names_what_is_wrong(lambda path: load_model(path, CPU), folder, values)


def in_our_format(folder, **options):
    """A network of diffusers in a folder of our own."""
    save(folder.with_name("pipeline"), DDIMScheduler(100, prediction_type="v_prediction"), unet(**options))
    saved = load_model(folder.with_name("pipeline"), CPU)
    folder.mkdir()
    fill_model_folder(folder, saved.network.state_dict(), saved.config, saved.schedule, None)
    return folder / "config.json"


FOREIGN = [
    (("network", "scheduler"), {"_class_name": "DiffusionPipeline"}),
    (("network", "scheduler"), {"_class_name": "EulerDiscreteScheduler"}),
    (("network", "scheduler"), {"_class_name": ["DDIMScheduler"]}),
    (("schedule", "diffusers"), {"_class_name": "UNet2DModel"}),
    (("schedule", "diffusers"), {"_class_name": "__getattr__"}),
    (("schedule", "diffusers"), {"num_train_timesteps": HUGE}),
    (("network", "unet"), {"class_embed_type": "timestep"}),
    (("network", "unet"), {"sample_size": 16}),
    (("network", "unet"), {"layers_per_block": 10**7}),
    (("network", "unet"), {"block_out_channels": [16] * 1000}),
    (("network", "unet"), {"block_out_channels": [2**40, 32]}),
    (("network", "unet"), {"down_block_types": ["DownBlock2D", "Unheard"]}),
    (("network",), {"prediction": "both"}),
    (("network",), {"num_classes": 3}),
    (("network",), {"image_size": 16}),
]


def test_the_allow_list_is_that_of_our_own_format_too(tmp_path, monkeypatch):
    """No other class of diffusers is made, and nothing too large."""
    file = in_our_format(tmp_path / "model")
    whole = file.read_text()
    made = []
    for name in ("DiffusionPipeline", "EulerDiscreteScheduler"):
        monkeypatch.setattr(getattr(diffusers, name), "__init__", lambda *a, **k: made.append(a))
    for place, values in FOREIGN:
        meta = json.loads(whole)
        del meta["checksum"]  # as of an earlier version: what is behind it is read
        functools.reduce(dict.__getitem__, place, meta).update(values)
        file.write_text(json.dumps(meta))
        message = refusal(load_model, tmp_path / "model", CPU, names=tmp_path / "model")
        assert not made and "checksum" not in message and len(message) < 1000, values


def test_a_schedule_of_a_configuration_is_of_the_allow_list():
    with pytest.raises(UsageError, match="DiffusionPipeline"):
        ScheduleConfig(name="diffusers", diffusers={"_class_name": "DiffusionPipeline"}).build()


@pytest.mark.parametrize("kind", [tuple, np.array])
def test_trained_betas_of_any_sequence(kind):
    betas = [0.125, 0.25, 0.5]
    angles = [
        adapt(unet(), DDIMScheduler(3, trained_betas=given))[1].phi(torch.ones(1)) for given in (betas, kind(betas))
    ]
    assert torch.equal(*angles)


@pytest.mark.parametrize("size", [[8, 8], (8, 8)])
def test_a_square_size_may_be_two_numbers(size, tmp_path):
    save(tmp_path, DDIMScheduler(100, prediction_type="v_prediction"))
    plain, _ = load_pipeline(tmp_path)
    file = tmp_path / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    network, _ = load_pipeline(tmp_path)
    assert network.config.image_shape == (1, 8, 8)
    z, phi = torch.randn(1, 1, 8, 8), torch.ones(1)
    assert torch.equal(network(z, phi), plain(z, phi))
    assert adapt(unet(size=size), DDIMScheduler(100))[0].config.image_size == 8
