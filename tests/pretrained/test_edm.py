"""EDM's own networks: what the authors' code computes with the same weights, and all that a teacher goes through."""

import json
import math
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pdfast.diffusion import ddim, sample
from pdfast.engine import parallelize
from pdfast.engine.cost import parameters_and_flops
from pdfast.io.plain import unstructure
from pdfast.plan.cost import activation_bytes, parameters
from pdfast.pretrained import edm, network_config
from pdfast.pretrained.model_folder import fill_model_folder, load_model
from tests.commands import ROOT, TINY_GIVEN, call, environment
from tests.data.errors import refusal
from tests.pretrained import edm_golden as golden
from tests.pretrained.pipelines import losses_in_one_process_and_in_two

CPU = torch.device("cpu")
GOLDEN = json.loads(Path(golden.__file__).with_suffix(".json").read_text())
LABELS = {"no labels": False, "labels": True}
UNUSED = {
    "model.map_augment.weight": (8, 9),
    "model.enc.4x4_down.conv0.resample_filter": (1, 1, 2, 2),
    "model.enc.4x4_down.skip.resample_filter": (1, 1, 2, 2),
}
"""What is in such files and not read."""


def write(folder, name="DDPM++", labelled=False, **changed):
    """The folder of a network with the golden weights; `changed` are arguments of EDMPrecond."""
    kwargs = golden.given(name, labelled) | changed
    meta = {"format": edm.FORMAT, "class_name": "EDMPrecond", "init_kwargs": kwargs}
    read = edm.init_kwargs(meta, "here")
    half = read.model_channels * read.channel_mult_noise // 2
    fourier = {edm.FREQUENCIES: (half,)} if read.embedding_type == "fourier" else {}
    network = read.config((1.0,) * half if fourier else ()).build()
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()} | fourier | UNUSED
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(meta))
    save_file({key: golden.weight(key, *shape) for key, shape in shapes.items()}, folder / edm.WEIGHTS)
    return folder


def loaded(tmp_path, *given, **changed):
    return load_model(write(tmp_path / "teacher", *given, **changed), CPU)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", golden.SETTINGS)
def test_its_numbers_are_those_of_the_authors_code(name, labels, tmp_path):
    """The denoiser at each noise level, and Euler's method, which is DDIM at the angles atan(sigma)."""
    labelled = LABELS[labels]
    network = loaded(tmp_path, name, labelled).network
    sigma = torch.tensor(golden.SIGMAS, dtype=torch.float64)
    phi = torch.atan(sigma)
    cos, sin = (f(phi).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    z = golden.noisy() * cos
    conditions = {"denoised": golden.labels() if labelled else None}
    if labelled:
        conditions["denoised without labels"] = None
    for key, cond in conditions.items():
        denoised = cos * z - sin * network(z.float(), phi.float(), cond)
        expected = torch.tensor(GOLDEN[name][labels][key], dtype=torch.float64)
        torch.testing.assert_close(golden.some(denoised), expected, atol=3e-5, rtol=1e-5)
    phi = torch.atan(torch.tensor(golden.EULER, dtype=torch.float64))
    start = golden.noise() * torch.sin(phi[0]).float()
    sampled = ddim(network, start, phi, cond=golden.labels()[:2] if labelled else None)
    expected = torch.tensor(GOLDEN[name][labels]["sampled"])
    torch.testing.assert_close(golden.some(sampled), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "limits, ends",
    [
        ({}, (0.002, 80.0)),
        ({"sigma_min": 0.01, "sigma_max": 50}, (0.01, 50.0)),
        ({"sigma_max": math.inf}, (0.002, 80.0)),
    ],
)
def test_its_schedule_is_that_of_the_authors_sampler(limits, ends, tmp_path):
    saved = loaded(tmp_path, **limits)
    phi = saved.schedule.build().phi(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(torch.tan(phi), torch.tensor(ends, dtype=torch.float64))


@pytest.mark.parametrize("name", ["NCSN++", "ADM"])
def test_as_a_model_folder_and_in_bf16(name, tmp_path):
    saved = loaded(tmp_path, name, True)
    assert saved.steps is None and saved.config.num_classes == golden.CLASSES and saved.config.prediction == "v"
    (tmp_path / "model").mkdir()
    fill_model_folder(tmp_path / "model", saved.network.state_dict(), saved.config, saved.schedule, 4)
    again = load_model(tmp_path / "model", CPU)
    assert again.config == saved.config and again.schedule == saved.schedule and again.steps == 4
    z, labels = torch.randn(3, 3, 8, 8), torch.tensor([2, 0, 1])
    phi = torch.tensor([0.3, 0.9, 1.5])
    full = saved.network(z, phi, labels)
    assert torch.equal(again.network(z, phi, labels), full)
    again.network.dtype = torch.bfloat16
    half = again.network(z, phi, labels)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.1 * full.abs().max()
    parallelize.cast_blocks(again.network, torch.bfloat16)
    assert torch.equal(again.network(z, phi, labels), half)
    count = sum(p.numel() for p in saved.network.parameters())
    assert parameters_and_flops(saved.config)[0] == parameters(saved.config).all == count
    assert parameters(saved.config).of_blocks > 0.5 * count and activation_bytes(saved.config, recomputed=True) > 0
    assert network_config(unstructure(saved.config), "here") == saved.config


@pytest.mark.parametrize(
    "kwargs, count, gflop",
    [
        ({"model_type": "SongUNet", "channel_mult": [2, 2, 2], "label_dim": 10}, 55_734_147, 42.4),
        ({"img_resolution": 64, "label_dim": 1000}, 295_899_267, 219.3),
    ],
)
def test_the_published_sizes(kwargs, count, gflop):
    """DDPM++ of CIFAR-10 with classes, and ADM of ImageNet 64x64, parameters counted in the authors' code."""
    kwargs = {"img_resolution": 32, "img_channels": 3} | kwargs
    config = edm.init_kwargs({"class_name": "EDMPrecond", "init_kwargs": kwargs}, "here").config(())
    assert parameters_and_flops(config) == (count, pytest.approx(gflop * 1e9, rel=2e-3))


@pytest.mark.parametrize("name", ["NCSN++", "ADM"])
def test_it_is_finite_at_every_angle(name, tmp_path):
    network = loaded(tmp_path, name).network.requires_grad_(True)
    phi = torch.tensor([0.0, 1e-6, 0.002, 0.8, math.atan(80), 1.5707, math.pi / 2])
    v = network(torch.randn(len(phi), 3, 8, 8), phi)
    v.square().sum().backward()
    assert v.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.label(phi).diff().min() >= 0


def test_dropout_is_of_training_alone(tmp_path):
    config = loaded(tmp_path).config
    network, z, phi = config.build(dropout=0.5), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 1.0])
    assert not torch.equal(network.train()(z, phi), network(z, phi))
    assert torch.equal(network.eval()(z, phi), network(z, phi))


def _change(folder, **values):
    file = folder / "config.json"
    meta = json.loads(file.read_text())
    meta["init_kwargs"] |= values.pop("init_kwargs", {})
    file.write_text(json.dumps(meta | values))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"class_name": "VPPrecond"}, "VPPrecond: only EDMPrecond is read"),
        ({"class_name": "iDDPMPrecond"}, "iDDPMPrecond"),
        ({"init_kwargs": {"model_type": "UViT"}}, "'UViT' is not 'SongUNet' or 'DhariwalUNet'"),
        ({"init_kwargs": {"encoder_type": "skip"}}, "'skip' is not 'standard' or 'residual'"),
        ({"init_kwargs": {"img_channels": None}}, "img_channels: None is not int"),
        ({"init_kwargs": {"colour": 1}}, "unknown field 'colour'"),
        ({"init_kwargs": {"channel_mult": [1, 2, 2, 2, 2]}}, "does not halve 4 times"),
        ({"init_kwargs": {"resample_filter": [1, 2, 1]}}, "resample_filter (1, 2, 1) does not halve"),
        ({"init_kwargs": {"num_blocks": 2}}, "in place of ["),
        ({"init_kwargs": {"model_channels": 16}}, "in place of ["),
        ({"init_kwargs": {"model_channels": 2}}, "model_channels 2 are too few"),
        ({"init_kwargs": {"num_blocks": 10**7}}, "num_blocks must be from 1 to"),
        ({"init_kwargs": {"channel_mult": [1, 0]}}, "channel_mult must be from 1"),
        ({"init_kwargs": {"embedding_type": "fourier"}}, "model.map_noise.freqs"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(tmp_path, values, words):
    folder = write(tmp_path / "teacher")
    _change(folder, **values)
    assert words in refusal(load_model, folder, CPU, names=folder)


def test_missing_and_damaged_weights(tmp_path):
    folder = write(tmp_path / "teacher")
    (folder / edm.WEIGHTS).write_bytes(b"damaged")
    assert "cannot be read as safetensors" in refusal(load_model, folder, CPU, names=folder / edm.WEIGHTS)
    (folder / edm.WEIGHTS).unlink()
    assert edm.SCRIPT in refusal(load_model, folder, CPU, names=folder / edm.WEIGHTS)


def test_a_pickle_is_not_opened(tmp_path, capsys):
    """Neither the file nor a folder that has only such: the message names what makes a folder of it."""
    (tmp_path / "edm-cifar10.pkl").write_bytes(b"not opened")
    for path in (tmp_path / "edm-cifar10.pkl", tmp_path):
        assert edm.SCRIPT in refusal(load_model, path, CPU, names=path)
        for command in (["sample", str(path)], ["distill", "--teacher", str(path)]):
            assert call(*command) == 2
            assert edm.SCRIPT in capsys.readouterr().err
    assert (ROOT / edm.SCRIPT).is_file()


class EDMPrecond(nn.Module):
    """What the pickle of the authors' network is to the script."""

    def __init__(self, folder):
        super().__init__()
        self.init_kwargs = json.loads((folder / "config.json").read_text())["init_kwargs"]
        self.weights = load_file(folder / edm.WEIGHTS)

    def state_dict(self):
        return self.weights


def write_pickle(path, *given):
    """What the script reads; returns the folder that it is to make of it."""
    folder = write(path.with_suffix(".expected"), *given)
    with open(path, "wb") as file:
        pickle.dump({"ema": EDMPrecond(folder), "loss_fn": None}, file)
    return folder


def test_the_script_writes_the_folder(tmp_path):
    folder = write_pickle(tmp_path / "network.pkl", "NCSN++", True)
    script = runpy.run_path(str(ROOT / edm.SCRIPT))
    script["write"](str(tmp_path / "network.pkl"), str(tmp_path / "written"))
    first, second = (load_model(f, CPU) for f in (folder, tmp_path / "written"))
    assert first.config == second.config and first.config.unet.fourier
    weights = second.network.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in first.network.state_dict().items())


@pytest.mark.filterwarnings("ignore:64 images are too few")
def test_it_is_distilled_and_exported(tmp_path, capsys):
    """Two rounds: students are of the same kind, --config brings the teacher back, and diffusers draws their images."""
    teacher = write(tmp_path / "teacher", "NCSN++", True, img_channels=1, label_dim=10)
    flags = [*TINY_GIVEN, "--teacher", str(teacher)]
    flags += "--rounds 2 --end-steps 2 --updates 3 --batch-size 16 --method progressive".split()
    run = tmp_path / "run"
    assert call("distill", *flags, "--run", str(run)) == 0
    assert call("distill", "--config", str(run / "config.yaml"), "--run", str(tmp_path / "again")) == 0
    weights = [(folder / "students/0002/student.safetensors").read_bytes() for folder in (run, tmp_path / "again")]
    assert weights[0] == weights[1]
    first, student = load_model(teacher, CPU), load_model(run / "students/0002", CPU)
    assert student.config == first.config and student.config.kind == "edm"
    assert any(
        not torch.equal(a, b) for a, b in zip(first.network.parameters(), student.network.parameters(), strict=True)
    )
    assert call("sample", str(run), "--count", "4", "--out", str(tmp_path / "a.png")) == 0
    assert call("distill", *flags, "--run", str(run), "--dry-run") == 0
    assert "GFLOP" in capsys.readouterr().out
    assert call("export", str(run), str(tmp_path / "out")) == 0
    assert "unet/pdfast_edm_unet.py" in (tmp_path / "out/README.md").read_text()


LOAD = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline
folder, out, *labels = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
options = {"class_labels": list(map(int, labels))} if labels else {}
generator = torch.Generator().manual_seed(7)
images = pipeline(num_inference_steps=2, batch_size=2, generator=generator, output_type="np", **options).images
numpy.save(out, images)
sys.exit(any(name.startswith("pdfast.") for name in sys.modules))
"""


@pytest.mark.parametrize(
    "name, labels",
    [
        pytest.param("DDPM++", (), marks=pytest.mark.slow),
        pytest.param("NCSN++", (), marks=pytest.mark.slow),
        ("ADM, deeper", (4, 1)),
    ],
)
def test_a_pipeline_of_it_needs_diffusers_alone(name, labels, tmp_path):
    """As a user loads it, who has no pdfast: the images are ours."""
    teacher, out = write(tmp_path / "teacher", name, bool(labels)), tmp_path / "out"
    assert call("export", str(teacher), str(out), "--steps", "2", "--device", "cpu") == 0
    saved = load_model(teacher, CPU)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    ours = sample(saved.network, z, saved.schedule.build(), 2, cond=torch.tensor(labels) if labels else None)
    given = environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(out), str(tmp_path / "images.npy"), *map(str, labels)]
    subprocess.run(command, env=given, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    theirs = torch.tensor(np.load(tmp_path / "images.npy")).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:64 images are too few")
@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_in_two_processes_in_parts(tmp_path, compiled):
    teacher = write(tmp_path / "teacher", "NCSN++", img_channels=1)
    losses = losses_in_one_process_and_in_two(tmp_path, teacher, "--engine.compile", compiled)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4
