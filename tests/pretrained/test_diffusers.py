"""Teachers of diffusers: read by an allow-list, and sampled to the images that diffusers itself samples."""

import json
import math
import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from pdfast.diffusion import ddim, sample
from pdfast.engine.cost import parameters_and_flops
from pdfast.io.errors import UsageError
from pdfast.io.plain import unstructure
from pdfast.plan.cost import activation_bytes, parameters
from pdfast.pretrained import adapt, load_pipeline, network_config
from pdfast.pretrained.model_folder import fill_model_folder, load_model
from tests.commands import TINY_GIVEN, call, environment
from tests.data.errors import refusal
from tests.pretrained.pipelines import drawn_by_diffusers, losses_in_one_process_and_in_two, save, unet

COSINE = "squaredcos_cap_v2"
SCHEDULERS = {
    "linear, eps": DDPMScheduler(1000),
    "scaled linear, eps": DDIMScheduler(1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine, v": DDIMScheduler(1000, beta_schedule=COSINE, prediction_type="v_prediction"),
    "cosine, x": DDPMScheduler(1000, beta_schedule=COSINE, prediction_type="sample"),
    "no signal left, v": DDIMScheduler(1000, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "trained": DDIMScheduler(
        num_train_timesteps=64, trained_betas=[0.01 + 0.005 * i for i in range(64)], prediction_type="v_prediction"
    ),
    "PNDM": PNDMScheduler(1000),
    "DPM-Solver": DPMSolverMultistepScheduler(1000),
    "UniPC": UniPCMultistepScheduler(1000, beta_schedule=COSINE, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_ddim_is_that_of_diffusers(name, tmp_path):
    scheduler = SCHEDULERS[name]
    theirs = save(tmp_path, scheduler)
    network, schedule = load_pipeline(tmp_path)
    noise = torch.randn(4, 1, 8, 8)
    for steps in (4, 8, 32 if name == "trained" else 50):
        x = drawn_by_diffusers(theirs, scheduler, noise, steps)
        ours = sample(network, noise, schedule.build(), steps)
        assert (ours - x).abs().max() < 1e-4 * x.abs().max().clamp(min=1)


def test_between_its_times_a_network_is_asked_at_fractional_ones(tmp_path):
    """Halfway in angle between two times, and below the first as at the first."""
    theirs = save(tmp_path, DDPMScheduler(1000))
    network, schedule = load_pipeline(tmp_path)
    u = torch.tensor([0.5005, 0.7, 0.9991, 0.0004], dtype=torch.float64)
    z = torch.randn(4, 1, 8, 8)
    expected = torch.tensor([499.5, 699.0, 998.1, 0.0])
    phi = schedule.build().phi(u).float()
    torch.testing.assert_close(network.label(phi), expected, atol=0.02, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(network(z, phi), theirs(z, expected).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_that_of_diffusers(tmp_path, scheduler, prediction):
    """Euler's method for the ODE of EDM is DDIM at the angles atan(sigma)."""
    theirs = save(tmp_path, scheduler(prediction_type=prediction, sigma_data=0.4))
    network, schedule = load_pipeline(tmp_path)
    assert network.prediction == "v"
    euler = EDMEulerScheduler(prediction_type=prediction, sigma_data=0.4)
    euler.set_timesteps(9)
    phi = torch.atan(euler.sigmas.double())
    noise = torch.randn(4, 1, 8, 8)
    x = noise * euler.sigmas[0]
    with torch.no_grad():
        for t in euler.timesteps:
            x = euler.step(theirs(euler.scale_model_input(x, t), t).sample, t, x).prev_sample
    ours = ddim(network, noise * torch.sin(phi[0]).float(), phi)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    ends = schedule.build().phi(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([math.atan(0.002), math.atan(80.0)], dtype=torch.float64))


def test_as_a_model_folder_and_in_bf16(tmp_path):
    theirs = save(tmp_path / "pipeline", DDPMScheduler(1000, prediction_type="v_prediction"), unet(classes=3))
    saved = load_model(tmp_path / "pipeline", torch.device("cpu"))
    assert saved.steps is None and saved.config.num_classes == 3
    (tmp_path / "model").mkdir()
    fill_model_folder(tmp_path / "model", saved.network.state_dict(), saved.config, saved.schedule, 4)
    again = load_model(tmp_path / "model", torch.device("cpu"))
    assert again.config == saved.config and again.schedule == saved.schedule and again.steps == 4
    z, phi, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 0.9, 1.5]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        full = saved.network(z, phi, labels)
        assert torch.equal(again.network(z, phi, labels), full)
        again.network.dtype = torch.bfloat16
        half = again.network(z, phi, labels)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.1 * full.abs().max()
    count = sum(p.numel() for p in theirs.parameters())
    assert parameters_and_flops(saved.config)[0] == parameters(saved.config).all == count
    assert parameters(saved.config).of_blocks > 0.5 * count and activation_bytes(saved.config) > 0
    assert network_config(unstructure(saved.config), "here") == saved.config


def _changed(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "file, values, words",
    [
        (
            "model_index.json",
            {"unet": ["mine", "UNet2DModel"]},
            ["['mine', 'UNet2DModel']", "only diffusers' UNet2DModel"],
        ),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, ["scheduler, unet, vae", "latent"]),
        ("model_index.json", {"scheduler": ["diffusers", "Evil"]}, ["Evil", "DDPMScheduler"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ["prediction_type 'flow'"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "secret"}, ["no schedule that can be read", "secret"]),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.5, -0.5]}, ["strictly decreasing"]),
        ("unet/config.json", {"sample_size": [8, 0]}, ["sample_size [8, 0]"]),
        ("unet/config.json", {"out_channels": 2}, ["1 channels in and 2 out"]),
        ("unet/config.json", {"time_embedding_type": "fourier"}, ["fourier"]),
        ("unet/config.json", {"class_embed_type": "timestep"}, ["timestep"]),
        ("unet/config.json", {"block_out_channels": [16]}, ["cannot be loaded"]),
        ("unet/config.json", {"block_out_channels": [24, 32]}, ["does not fit", "conv_in.weight is [16, 1, 3, 3]"]),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(tmp_path, file, values, words):
    save(tmp_path / "pipeline", DDPMScheduler(1000))
    _changed(tmp_path / "pipeline", file, **values)
    message = refusal(load_pipeline, tmp_path / "pipeline", names="pipeline")
    assert all(word in message for word in words), message


def test_pickled_weights_are_not_read(tmp_path):
    save(tmp_path, DDPMScheduler(1000))
    (weights,) = (tmp_path / "unet").glob("*.safetensors")
    torch.save(load_file(weights), tmp_path / "unet/diffusion_pytorch_model.bin")
    weights.unlink()
    assert "safe_serialization=True" in refusal(load_pipeline, tmp_path, names=tmp_path)


def test_schedulers_of_another_kind_are_refused(tmp_path):
    save(tmp_path / "a", EulerDiscreteScheduler())
    assert "EulerDiscreteScheduler" in refusal(load_pipeline, tmp_path / "a", names="a")


@pytest.mark.filterwarnings("ignore:64 images are too few")
def test_it_is_distilled_and_the_run_goes_on(tmp_path, capsys):
    """A T = 1000 teacher of v at 8 steps, to 2: its students are of the same kind; --config and --teacher both bring it back."""
    scheduler = DDPMScheduler(1000, beta_schedule=COSINE, prediction_type="v_prediction")
    save(tmp_path / "pipeline", scheduler, unet(classes=10))
    run = tmp_path / "run"
    command = [
        *TINY_GIVEN,
        "--teacher",
        str(tmp_path / "pipeline"),
        *"--rounds 2 --end-steps 2 --updates 3 --batch-size 16 --method progressive".split(),
    ]
    assert call("distill", *command, "--run", str(run)) == 0
    assert call("distill", *command, "--run", str(run)) == 0  # finished already
    assert call("distill", "--config", str(run / "config.yaml"), "--run", str(tmp_path / "again")) == 0
    weights = [(folder / "students/0002/student.safetensors").read_bytes() for folder in (run, tmp_path / "again")]
    assert weights[0] == weights[1]
    assert load_model(run / "students/0002", torch.device("cpu")).config.kind == "diffusers"
    assert call("sample", str(run), "--count", "4", "--out", str(tmp_path / "a.png")) == 0
    assert call("distill", *command, "--run", str(run), "--dry-run") == 0
    assert "GFLOP" in capsys.readouterr().out


def test_an_eps_teacher_near_pure_noise_is_refused_with_what_to_do(tmp_path, capsys):
    save(tmp_path / "pipeline", DDPMScheduler(1000))
    flags = ["--device", "cpu", "--teacher", str(tmp_path / "pipeline"), "--run", str(tmp_path / "run")]
    assert call("distill", *flags) == 2
    message = capsys.readouterr().err
    assert "--convert v" in message and "u-start" in message
    save(tmp_path / "cosine", DDPMScheduler(1000, beta_schedule=COSINE))
    assert call("sample", str(tmp_path / "cosine"), "--device", "cpu") == 2
    assert "eps-prediction is singular" in capsys.readouterr().err
    assert call("distill", *flags, "--schedule.u-start", "0.9", "--dry-run") == 0


def test_it_is_left_out_of_an_import():
    """diffusers takes seconds to import: only its own teachers do so."""
    code = "import sys, pdfast.distill; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:64 images are too few")
@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_in_two_processes_in_parts(tmp_path, compiled):
    """Each block's parameters divided, and each block compiled: the losses are those of one process as it is."""
    scheduler = DDPMScheduler(1000, beta_schedule=COSINE, prediction_type="v_prediction")
    one_level = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    save(tmp_path / "pipeline", scheduler, unet(**one_level))
    losses = losses_in_one_process_and_in_two(tmp_path, tmp_path / "pipeline", "--engine.compile", compiled)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


@pytest.mark.parametrize(
    "parts, words",
    [
        ((torch.nn.Linear(2, 2), DDPMScheduler(10)), "not a Linear"),
        ((unet(), "linear"), "not of a str"),
        ((unet(), EulerDiscreteScheduler()), "this scheduler is a 'EulerDiscreteScheduler'"),
    ],
)
def test_what_cannot_be_adapted(parts, words):
    with pytest.raises(UsageError, match=words):
        adapt(*parts)


def test_older_names_of_the_attentions_weights(tmp_path):
    """As in the checkpoints of 2022: query, key, value and proj_attn."""
    theirs = save(tmp_path, DDPMScheduler(1000))
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, old in older.items():
        weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    network, _ = load_pipeline(tmp_path)
    assert all(torch.equal(weight, network.unet.state_dict()[name]) for name, weight in theirs.state_dict().items())
