"""Images that are not finite are neither shown nor measured: one line that says at how many steps, and nothing written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pdfast.export
from pdfast.diffusion import Cosine
from pdfast.engine.world import World
from pdfast.evaluation.evaluator import draw
from pdfast.io.errors import RunError
from pdfast.io.files import sha256
from pdfast.recipes import DIGITS
from tests.commands import TINY_DISTILL, call, rewrite_config

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:64 images are too few")


class Overflows:
    """A network that gives one value that is not finite, in one image."""

    prediction = "v"
    config = DIGITS.network

    def __init__(self, value, at):
        self.value, self.at = value, at

    def __call__(self, z, phi, cond=None):
        output = 0.1 * z
        if len(z) > self.at:
            output[self.at, 0, 0, 0] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_evaluation_looks_at_every_image(value):
    """At one in the last batch too."""
    with pytest.raises(RunError, match="in 4 steps are not finite"):
        draw(Overflows(value, 2), Cosine(), 4, 13, World(CPU), seed=0, batch_size=5)
    with pytest.raises(RunError, match="in 1 step are not finite"):
        draw(Overflows(value, 0), Cosine(), 1, 1, World(CPU), seed=0)


@pytest.fixture
def overflowing(finished_run, tmp_path):
    """A run whose student of 2 steps has finite weights, and puts out images that are not."""
    shutil.copytree(finished_run, tmp_path / "run")
    folder = tmp_path / "run/students/0002"
    weights = load_file(folder / "student.safetensors")
    weights["conv_out.weight"] = torch.full_like(weights["conv_out.weight"], 3e38)
    save_file(weights, folder / "student.safetensors")
    rewrite_config(folder, sha256=sha256(folder / "student.safetensors"))
    return tmp_path / "run"


def test_no_command_shows_them(overflowing, tmp_path, capsys):
    run, out = str(overflowing), tmp_path / "out"
    for command in (
        ["sample", run, "--steps", "2", "--count", "4", "--out", f"{out}.png"],
        ["sample", run, "--steps", "2", "--sampler", "ancestral", "--out", f"{out}.npz"],
        ["evaluate", run, "--steps", "2", "--json", f"{out}.json"],
        ["export", run, str(out), "--steps", "2"],
    ):
        assert call(*command, "--device", "cpu") == 1, command
        error = capsys.readouterr().err.strip()
        assert "in 2 steps are not finite" in error and "\n" not in error
    assert not list(tmp_path.glob("out*"))
    from pdfast import demo

    models = demo.Models(overflowing, 4, CPU)
    with pytest.raises(RunError, match="not finite"):
        models.draw(models.students[2], 2, 0, ())


def test_a_run_ends_before_it_evaluates_them(finished_run, tmp_path, capsys, monkeypatch):
    """A student that overflows when it is sampled: no folder of it, no figures; the teacher stays."""
    import pdfast.evaluation.evaluator as evaluator

    whole = evaluator.sample
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/students/0001")

    def sample(model, z, schedule, steps, **options):
        x = whole(model, z, schedule, steps, **options)
        return x / 0 if steps == 1 else x

    monkeypatch.setattr(evaluator, "sample", sample)
    assert call("distill", *TINY_DISTILL, "--run", str(tmp_path / "run")) == 1
    assert "in 1 step are not finite" in capsys.readouterr().err
    assert (tmp_path / "run/students/0002/metrics.json").exists() and not (tmp_path / "run/students/0001").exists()


def test_an_export_looks_at_both(finished_run, tmp_path, capsys, monkeypatch):
    """What diffusers draws, too."""
    whole = pdfast.export.load_again

    def load_again(*arguments):
        pipeline = whole(*arguments)
        with torch.no_grad():
            pipeline.unet.conv_out.bias.fill_(float("nan"))
        return pipeline

    monkeypatch.setattr(pdfast.export, "load_again", load_again)
    assert call("export", str(finished_run), str(tmp_path / "out"), "--steps", "1", "--device", "cpu") == 1
    assert "in 1 step are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
