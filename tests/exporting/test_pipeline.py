"""A model as a pipeline of diffusers: the same network at every time, the same images."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import nn

from pdfast.diffusion import Cosine, LinearBeta
from pdfast.export import compare, export_pipeline, load_again
from pdfast.exporting.pipeline import betas, number_of_times, write_pipeline
from pdfast.networks import NetworkConfig
from pdfast.networks.edm_unet import EDMUNetConfig
from pdfast.pretrained import ConvertedConfig, EDMConfig, load_pipeline
from pdfast.pretrained.model_folder import SavedModel, load_model
from pdfast.schedule_config import ScheduleConfig
from tests.commands import call
from tests.networks.test_unet import perturbed
from tests.pretrained.pipelines import save, unet

CPU = torch.device("cpu")


def ours(prediction="v", *, mult=(1, 2), emb=32, classes=0, channels=8, attention=(4,)):
    config = NetworkConfig(8, 3, channels, mult, 1, attention, 8, emb, 4, prediction, classes)
    return perturbed(config.build())


def diffusers_network(tmp_path, scheduler, **options):
    save(tmp_path / "teacher", scheduler, unet(channels=3, **options))
    return load_pipeline(tmp_path / "teacher")[0]


GUIDED = EDMUNetConfig("DhariwalUNet", 8, 3, 3, 8, (1, 2), 4, 1, (4,), guidance=(0.0, 3.0))
NETWORKS = {
    "v": lambda p: ours(),
    "x": lambda p: ours("x"),
    "no attention": lambda p: ours(attention=()),
    "attention everywhere, wider than the embedding": lambda p: ours(attention=(8, 4), mult=(2, 2), emb=24),
    "classes": lambda p: ours(classes=5),
    "both": lambda p: ours("both"),
    "flow": lambda p: ours("flow"),
    "converted from x": lambda p: perturbed(ConvertedConfig(ours("x").config).build()),
    "converted from eps": lambda p: perturbed(ConvertedConfig(ours("eps", classes=3).config).build()),
    "guidance as an input": lambda p: perturbed(replace(ours(classes=5).config, guidance=(0.0, 3.0)).build()),
    "EDM's own, guidance as an input": lambda p: perturbed(
        EDMConfig(replace(GUIDED, model_type="SongUNet"), 0.002, 0.5).build()
    ),
    "ADM, guidance as an input": lambda p: perturbed(EDMConfig(GUIDED, 0.002, 0.5).build()),
    "diffusers, v": lambda p: diffusers_network(p, DDPMScheduler(1000, prediction_type="v_prediction")),
    "diffusers, x, classes": lambda p: diffusers_network(p, DDPMScheduler(1000, prediction_type="sample"), classes=4),
    "diffusers, converted": lambda p: perturbed(
        ConvertedConfig(diffusers_network(p, DDPMScheduler(1000)).config).build()
    ),
    "EDM": lambda p: diffusers_network(p, EDMEulerScheduler()),
}
PLAIN = {"v", "x", "no attention", "attention everywhere, wider than the embedding", "classes", "diffusers, v"}
PLAIN |= {"diffusers, x, classes", "guidance as an input"}


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_samples_the_same_images(name, tmp_path):
    network = NETWORKS[name](tmp_path).eval().requires_grad_(False)
    network(torch.randn(1, 3, 8, 8), torch.ones(1), network.config.condition(torch.zeros(1).long()))
    schedule = ScheduleConfig() if name != "EDM" else ScheduleConfig("clipped_cosine", logsnr_min=-8.0, logsnr_max=8.0)
    for steps in (1, 4):
        saved = SavedModel(network, schedule, steps, tmp_path)
        out = tmp_path / f"out{steps}"
        assert export_pipeline(saved, steps, out, CPU) <= 1e-3
        index = json.loads((out / "model_index.json").read_text())
        assert (index["unet"] == ["diffusers", "UNet2DModel"]) == (name in PLAIN)
        assert (out / "grid.png").exists() and f"num_inference_steps={steps}" in (out / "README.md").read_text()


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta()])
@pytest.mark.parametrize("steps", [1, 3, 8, 256])
def test_the_betas_are_those_of_our_angles(schedule, steps):
    times = number_of_times(steps)
    assert times >= 8 * steps and times >= 1024 and times % steps == 0
    table = torch.cumprod(1 - betas(schedule, times), 0)
    for k in range(1, steps + 1):
        u = torch.tensor(k / steps, dtype=torch.float64)
        expected = torch.cos(schedule.phi(u)) ** 2
        torch.testing.assert_close(table[k * times // steps - 1], expected, atol=1e-12, rtol=1e-9)


def test_another_network_is_noticed(tmp_path, monkeypatch):
    """What is compared is what was written: a changed weight is a bug that is reported, and nothing appears."""
    network = ours().eval().requires_grad_(False)
    saved = SavedModel(network, ScheduleConfig(), 2, tmp_path)

    def wrong(folder, network: nn.Module, *rest):
        with torch.no_grad():
            network.conv_out.bias.add_(0.1)
        custom = write_pipeline(folder, network, *rest)
        with torch.no_grad():
            network.conv_out.bias.sub_(0.1)
        return custom

    monkeypatch.setattr("pdfast.export.write_pipeline", wrong)
    with pytest.raises(Exception, match="diffusers draws other images"):
        export_pipeline(saved, 2, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_the_command(finished_run, tmp_path, capsys):
    assert call("export", str(finished_run), str(tmp_path / "one")) == 0
    assert "in 1 step (" in capsys.readouterr().out
    card = (tmp_path / "one/README.md").read_text()
    assert "FD-digits" in card and "digits, 1797 images of 8x8x1" in card and "12 updates" in card
    saved = load_model(finished_run / "students/0001", CPU)
    assert compare(tmp_path / "one", False, saved, 1, CPU)[1] <= 1e-3
    pipeline = load_again(tmp_path / "one", False)
    assert len(pipeline(batch_size=3, num_inference_steps=1).images) == 3
    assert call("export", str(finished_run), str(tmp_path / "two"), "--steps", "2", "--format", "safetensors") == 0
    assert load_model(tmp_path / "two", CPU).steps == 2


def test_bad_input(finished_run, tmp_path, capsys):
    for arguments, words in (
        ([str(finished_run), str(tmp_path)], "is there already"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "out")], "no folder"),
        ([str(finished_run), str(tmp_path / "out"), "--steps", "0"], "--steps must be from 1"),
    ):
        assert call("export", *arguments) == 2
        assert words in capsys.readouterr().err
