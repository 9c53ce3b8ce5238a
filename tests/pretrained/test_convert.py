"""A copy that predicts v: exact where the algebra is regular, bounded elsewhere, better for its training."""

import json
import math
import runpy

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from pdfast.data import ResidentImages
from pdfast.diffusion import Cosine, sample, to_v
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.world import World
from pdfast.io.plain import unstructure
from pdfast.methods import Reparameterize
from pdfast.networks import NetworkConfig, UNet
from pdfast.networks.converted import LEAST, as_v, regular_angles
from pdfast.pretrained import ConvertedConfig, network_config
from pdfast.pretrained.model_folder import load_model
from tests.commands import ROOT, TINY_GIVEN, TINY_RUN, call
from tests.networks.test_unet import perturbed
from tests.pretrained.pipelines import save

PREDICTIONS = ("x", "eps", "both", "flow")


def inner(prediction):
    return NetworkConfig(8, 1, 8, (1,), 1, (), 8, 16, 4, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_says_what_its_network_says(prediction):
    """In float64, wherever neither cos nor sin is small."""
    copy = perturbed(ConvertedConfig(inner(prediction)).build())
    z = torch.randn(5, 1, 8, 8)
    phi = torch.linspace(0.11, math.pi / 2 - 0.11, 5)
    with torch.no_grad():
        expected = to_v(prediction, copy.network(z, phi).double(), z.double(), phi.double())
        torch.testing.assert_close(copy(z, phi).double(), expected, atol=2e-5, rtol=1e-5)
    assert copy.prediction == "v" and copy.config.image_shape == (1, 8, 8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_bounded_and_continuous_everywhere(prediction):
    phi = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)
    s, *others = as_v(prediction).coefficients(phi)
    assert s is None
    for values in others:
        assert values.abs().max() <= 1 / LEAST
        assert values.diff(dim=0).abs().max() < 0.02


def test_a_perfect_eps_teacher_stays_one():
    """Of normal images of deviation 1/2, whose best eps is known, the copy differs from it only near pure noise."""

    class Perfect(nn.Module):
        prediction = "eps"

        def forward(self, z, phi, cond=None):
            cos, sin = torch.cos(phi).view(-1, 1, 1, 1), torch.sin(phi).view(-1, 1, 1, 1)
            return z * sin / (0.25 * cos**2 + sin**2)

    copy = ConvertedConfig(inner("eps")).build()
    copy.network = Perfect()
    start = torch.tensor(0.93 * math.pi / 2)
    z = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        ours = copy(z, start.expand(4))
        theirs = to_v("eps", copy.network(z, start.expand(4)), z, start)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    images = sample(copy, torch.randn(512, 1, 8, 8), Cosine(), 64)
    assert 0.45 < images.std() < 0.56


def test_plain_data_and_back():
    config = ConvertedConfig(inner("x"))
    assert network_config(unstructure(config), "here") == config


@pytest.mark.filterwarnings("ignore:64 images are too few")
@pytest.mark.parametrize("library", ["ours", "diffusers"])
def test_it_is_made_judged_and_distilled(tmp_path, capsys, library):
    teacher = tmp_path / "teacher"
    if library == "ours":
        network = ["--network.prediction", "x"]
        assert call("train", *TINY_RUN, *network, "--train.updates", "40", "--run", str(tmp_path / "made")) == 0
        teacher = tmp_path / "made/teacher"
    else:
        example = runpy.run_path(str(ROOT / "examples/eps_teacher.py"))
        assert len(example["train"](str(teacher), updates=3)) == 3
    command = [
        *TINY_GIVEN,
        "--teacher",
        str(teacher),
        "--convert",
        "v",
        *"--convert-updates 20 --batch-size 16".split(),
    ]
    command += "--rounds 2 --updates 3 --learning-rate 2e-3 --method progressive".split()
    run = tmp_path / "run"
    assert call("distill", *command, "--run", str(run)) == 0
    metrics = json.loads((run / "teacher/metrics.json").read_text())
    assert metrics["training"]["updates"] == 20
    conversion = metrics["conversion"]
    assert conversion["from"] == ("x" if library == "ours" else "eps")
    assert (
        [row["steps"] for row in conversion["original"]] == [row["steps"] for row in conversion["untrained"]] == [4, 1]
    )
    student = load_model(run / "students/0001", torch.device("cpu"))
    assert student.config.kind == "converted" and student.config.prediction == "v"
    assert "made to predict v" in (run / "report.html").read_text()
    # Killed after its teacher was made, it goes on from there.
    assert call("distill", *command, "--run", str(run)) == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--convert", "v"], "--convert is for a teacher that is given"),
        (["--convert", "eps"], "eps"),
    ],
)
def test_bad_input(flags, words, capsys):
    assert call("distill", *flags) == 2
    assert words in capsys.readouterr().err


def test_a_teacher_of_v_is_not_converted(tmp_path, capsys):
    save(tmp_path, DDPMScheduler(1000, prediction_type="v_prediction"))
    assert call("distill", "--teacher", str(tmp_path), "--convert", "v", "--dry-run") == 2
    assert "predicts v already" in capsys.readouterr().err


def test_its_inner_network_is_in_bf16_too():
    copy = ConvertedConfig(inner("x")).build()
    copy.dtype = torch.bfloat16
    assert isinstance(copy.network, UNet) and copy.network.dtype == torch.bfloat16
    assert list(copy.blocks()) == list(copy.network.blocks())


@pytest.mark.parametrize("prediction", ["eps", "x"])
def test_what_it_learns(prediction):
    """Of images that are all 0.3, where the truth is known: the original's v where that is regular, the true one elsewhere,
    each for half of the images."""
    images = torch.full((4, 8, 8, 1), round((0.3 + 1) * 127.5), dtype=torch.uint8)
    batch = TrainingBatch(
        ResidentImages("flat", images),
        World(torch.device("cpu")),
        inner(prediction),
        seed=1,
        batch_size=64,
        flip=False,
    )
    batch.load(0, 0)
    original = perturbed(inner(prediction).build(), 3)
    end = math.pi / 2
    regular = regular_angles(prediction, end)
    seen = []

    class Copy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, z, phi, cond=None):
            seen.append((z, phi))
            return 0 * z + self.weight

    copy = Copy()
    losses, _ = Reparameterize(copy, original, regular, end).gradient(batch)
    [(z, phi)] = seen
    inside = (phi >= regular[0]) & (phi <= regular[1])
    assert 16 < inside.sum() < 48 and phi.min() >= 0 and phi.max() <= end + 1e-6
    cos, sin = (f(phi.double()).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    x = images[0, 0, 0, 0] / 127.5 - 1
    truth = (z.double() * cos - x) / sin  # v = (cos z - x) / sin
    with torch.no_grad():
        theirs = to_v(prediction, original(z, phi).double(), z.double(), phi.double())
    expected = torch.where(inside.view(-1, 1, 1, 1), theirs, truth).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(
        copy.weight.grad.double(),
        -2 * torch.where(inside.view(-1, 1, 1, 1), theirs, truth).mean(),
        rtol=1e-3,
        atol=1e-5,
    )


def test_where_it_is_exact_it_is_not_trained():
    assert regular_angles("both", 1.5) == (0.0, 1.5)
    assert regular_angles("eps", 1.4) == (0.0, 1.4)  # a schedule that ends before
    low, high = regular_angles("x", 1.5)
    assert math.sin(low) == pytest.approx(LEAST) and high == 1.5
    assert math.cos(regular_angles("eps", 1.57)[1]) == pytest.approx(LEAST)
