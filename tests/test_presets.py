"""Every preset at its full size, on an image or two: an update of the teacher, then of its student."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from benchmarks.recipes import cost_of
from pdfast.data import ResidentImages
from pdfast.diffusion import build_step_table
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.cost import parameters_and_flops
from pdfast.engine.optimizer import Optimizer
from pdfast.engine.world import World
from pdfast.evaluation import mobilenet
from pdfast.methods import Denoise, Progressive, RoundTable
from pdfast.networks import UNet
from pdfast.pretrained.model_folder import load_model
from pdfast.recipes import PRESETS
from pdfast.rounds import fields_of_plan
from tests.commands import call

pytestmark = pytest.mark.slow
ALONE = World(torch.device("cpu"))


def test_fashion_is_for_a_laptop():
    """At most 0.15 GFLOP a forward and image, and all of it within 90 minutes at 80 GFLOP/s."""
    config = PRESETS["fashion"]
    config = dataclasses.replace(config, **fields_of_plan(config.plan))
    flops = parameters_and_flops(config.network)[1]
    assert flops <= 0.15e9
    forwards = config.train.updates * config.train.batch_size * 3 + cost_of(config)
    assert forwards * flops < 90 * 60 * 80e9


@pytest.mark.parametrize("name", PRESETS)
def test_an_update_of_teacher_and_student(name):
    config = PRESETS[name]
    channels, height, width = config.network.image_shape
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, channels), dtype=np.uint8)
    labels = torch.tensor([3, 1]) if config.network.num_classes else None
    source = ResidentImages("noise", torch.from_numpy(images), labels)
    batch = TrainingBatch(source, ALONE, config.network, seed=0, batch_size=2, flip=config.flip)
    schedule = config.schedule.build()

    torch.manual_seed(0)
    network = UNet(config.network, dropout=config.train.dropout).train()
    optimizer = Optimizer(network, ALONE, clip=config.train.clip, weight_decay=config.train.weight_decay)
    batch.load(0, 0)
    losses, teacher = [], Denoise(network, schedule, config.train.weighting)
    for update in range(2):
        loss = teacher.gradient(batch)[0].mean()
        optimizer.set(update, 1e-3)
        optimizer.step(loss)
        losses.append(float(loss))
    assert losses[1] < losses[0] and int(optimizer.steps) == 2

    del optimizer
    # A student that equals its teacher already does, but for the curvature, what two of the teacher's steps do; of many
    # steps there is little curvature, of one a lot.
    network.eval()
    batch.load(1, 0)
    many, one = (
        Progressive(
            network,
            network,
            RoundTable(build_step_table(schedule, steps, config.network.prediction, config.weighting)),
        )
        .gradient(batch)[0]
        .mean()
        for steps in (1 << 16, 1)
    )
    assert 0 < many < 0.01 * one


@pytest.mark.skipif(
    importlib.util.find_spec(mobilenet.PACKAGE) is None, reason=f"no MobileNetV2 weights: {mobilenet.INSTALL}"
)
@pytest.mark.filterwarnings("ignore:16 images are too few")
def test_cifar10_fast_from_nothing_to_one_step(tmp_path, capsys):
    """The command, on images of the shape of CIFAR-10."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
    command = (
        f"--preset cifar10-fast --data {tmp_path}/images.npy --device cpu --rounds 1 --updates 2 --batch-size 2 --train.updates 2 "
        f"--train.batch-size 2 --checkpoint-every 1 --evaluation.num-samples 16 --run {tmp_path}/run"
    ).split()
    assert call("distill", *command) == 0
    assert "FD-MobileNetV2" in capsys.readouterr().out
    assert load_model(tmp_path / "run/students/0001", torch.device("cpu")).steps == 1
