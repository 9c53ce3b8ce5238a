"""What can be known before a run begins is refused then: nothing is trained, no folder is made, by a dry run as by a run."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pdfast.checks import _plain_values, check_job, check_values
from pdfast.config import DistillConfig, TrainConfig
from pdfast.engine import device
from pdfast.engine.device import open_device
from pdfast.evaluation.inception import InceptionV3
from pdfast.io.bounds import NETWORK, SETTINGS
from pdfast.io.errors import UsageError
from pdfast.io.files import write_folder
from pdfast.io.plain import structure, unstructure
from pdfast.networks import NetworkConfig
from pdfast.pretrained.model_folder import fill_model_folder
from pdfast.recipes import DIGITS, PRESETS
from pdfast.rounds import resolve_steps
from tests.commands import TINY_DISTILL, TINY_RUN, call, one_line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run in which nothing may be trained."""

    def refuse(*arguments, **settings):
        raise AssertionError("something is trained")

    monkeypatch.setattr("pdfast.engine.machine.Machine.prepare_student", refuse)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--evaluation.num-samples 3", ["--evaluation.num-samples must be at least 4", "third nearest", "got 3"]),
        ("--schedule.name linear_beta --schedule.beta-max inf", ["--schedule.beta-max must be", "inf"]),
        ("--schedule.name linear_beta --schedule.beta-max nan", ["--schedule.beta-max must be", "nan"]),
        ("--schedule.name linear_beta --schedule.beta-max 1000", ["angles of linear_beta do not rise"]),
        ("--schedule.u-start 0", ["--schedule.u-start must be in (0, 1]"]),
        ("--network.num-groups 0", ["num_groups must be from 1"]),
        ("--network.head-dim 0", ["head_dim must be from 1"]),
        ("--network.head-dim -8", ["head_dim must be from 1", "-8"]),
        ("--network.channels 7 --network.num-groups 1 --network.head-dim 7", ["channels must be even"]),
        ("--network.channels 2 --network.num-groups 1 --network.head-dim 2", ["channels must be from 4"]),
        ("--network.attention-resolutions 8 5", ["--network.attention-resolutions 5", "of 8;"]),
        ("--network.num-res-blocks 10000000", ["num_res_blocks must be from 0 to 100"]),
        ("--network.channel-mult 1024 1024 --network.channels 65536 --network.image-size 8", ["parameters, more than"]),
        ("--network.emb-channels 0", ["emb_channels must be from 1"]),
        ("--network.image-channels 2 --evaluation.features mobilenet --data {two}", ["mobilenet takes images of 1 or 3 channels, not 2"]),
        ("--network.image-channels 4 --evaluation.features mobilenet --data {four}", ["1 or 3 channels, not 4"]),
        ("--evaluation.features {bad}", ["bad.pth as a file of weights"]),
        ("--evaluation.features {other}", ["other.safetensors does not hold the Inception network"]),
        ("--evaluation.features {nan}", ["nan.safetensors has weights that are not finite"]),
        ("--train.dropout -0.5", ["--train.dropout must be in [0, 1)"]),
        ("--train.learning-rate inf", ["--train.learning-rate must be above 0"]),
        ("--train.weight-decay nan", ["--train.weight-decay must be", "nan"]),
        ("--engine.patience inf", ["--engine.patience must be"]),
        ("--engine.optimizer apex", ["apex is not installed"]),
        ("--start-steps 2097152 --rounds 2", ["--start-steps must be from 1 to 1048576"]),
        ("--rounds 25", ["--rounds 25 means more than 1048576 steps"]),
        ("--updates 99999999999", ["--updates must be at most"]),
    ],
)  # fmt: skip
def test_refused_before_anything_is_done(flags, words, weights, run, capsys):
    """By a dry run too, where the check is not one of the command line or of the job alone."""
    command = ["distill", *TINY_DISTILL, "--run", str(run), *(flag.format(**weights) for flag in flags.split())]
    for more in ([], ["--dry-run"]) if "{" in flags else ([],):
        one_line(capsys, call(*command, *more), 2, *words)
    assert not run.exists()


def test_a_plan_needs_no_weights_of_a_package(run, monkeypatch, capsys):
    monkeypatch.setattr("pdfast.evaluation.mobilenet.PACKAGE", "a_package_that_is_not_there")
    command = ["distill", *TINY_DISTILL, "--run", str(run), "--evaluation.features", "mobilenet"]
    assert call(*command, "--dry-run") == 0
    assert "not installed here: pip install" in capsys.readouterr().out
    one_line(capsys, call(*command), 2, "pip install")
    assert not run.exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of features that are none, and images of two and four channels."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        network = InceptionV3()
    tensors = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in network.state_dict().items()}
    tensors["fc.weight"][0, 0] = float("nan")
    (folder / "bad.pth").write_bytes(b"no weights")
    save_file({"weight": torch.ones(2)}, folder / "other.safetensors")
    save_file(tensors, folder / "nan.safetensors")
    for name, channels in (("two", 2), ("four", 4)):
        np.save(folder / f"{name}.npy", np.zeros((200, 8, 8, channels), np.uint8))
    return {name: folder / file for name, file in {
        "bad": "bad.pth", "other": "other.safetensors", "nan": "nan.safetensors", "two": "two.npy", "four": "four.npy"
    }.items()}  # fmt: skip


@pytest.mark.parametrize(
    "flags, words",
    [("--evaluation-steps 0", ["--evaluation-steps must be from 1"]), ("--train.ema 1", ["--train.ema must be in"])],
)
def test_a_teachers_run_is_refused_too(flags, words, run, capsys):
    one_line(capsys, call("train", *TINY_RUN, "--run", str(run), *flags.split()), 2, *words)
    assert not run.exists()


def changed(plain, place, value):
    first, _, rest = place.partition(".")
    return plain | {first: changed(plain[first], rest, value) if rest else value}


NUMBERS = [*SETTINGS, *(f"network.{name}" for name in NETWORK)]


@pytest.mark.parametrize("place", NUMBERS)
def test_any_number_is_refused_in_a_line_or_runs(place):
    """0, -1, no number, infinite, huge: a UsageError, or a job that can begin; neither takes long."""
    cls = TrainConfig if place == "evaluation_steps" else DistillConfig
    small = {"rounds": 1, "start_steps": 2, "end_steps": 1, "updates": "2"}
    plain = unstructure(DIGITS) | small
    names = {field.name for field in dataclasses.fields(cls)}
    plain = {name: value for name, value in (plain | {"evaluation_steps": [1]}).items() if name in names}
    steps, began = ("rounds", "start_steps", "end_steps"), time.process_time()
    for value in (0, -1, 1e-300, float("nan"), float("inf"), -float("inf"), 10**30, 2**63, 1e300):
        several = place.rpartition(".")[2] in ("channel_mult", "attention_resolutions", "evaluation_steps", "grids")
        try:
            config = structure(cls, changed(plain, place, [value] if several else value), "here")
            if place in steps:
                given = tuple(getattr(config, name) if name == place else None for name in steps)
                resolved = resolve_steps(given, (1, 2, 1))
                config = dataclasses.replace(config, **dict(zip(steps, resolved, strict=True)))
            check_values(config)
            check_job(config)
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert np.isfinite(value) and abs(value) < 1e10
    assert time.process_time() - began < 10


def test_every_number_has_bounds():
    """Also those that are None in a preset, and of the network."""
    for config in PRESETS.values():
        check_values(dataclasses.replace(config, start_steps=2, rounds=1, end_steps=1))
        no_flags = {"prediction", "null_label", "guidance"}  # of numbers; the two last follow from other flags
        of_network = {f.name for f in dataclasses.fields(NetworkConfig) if f.name not in no_flags}
        assert of_network == NETWORK.keys()
    numbers = {place for place, value in _plain_values(DIGITS) if type(value) in (int, float)}
    unset = {"minutes", "rounds", "start_steps", "end_steps", "evaluation_steps", "tract.grids", "kept.pair_steps"}
    assert numbers | unset == SETTINGS.keys()


def test_attention_that_an_earlier_run_never_had(tmp_path):
    """It goes on as it was begun."""
    config = dataclasses.replace(DIGITS, run=tmp_path, rounds=1, start_steps=2, end_steps=1)
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, attention_resolutions=(3,)))
    with pytest.raises(UsageError, match="--network.attention-resolutions 3: .* but of 8, 4;"):
        check_job(config)
    (tmp_path / "config.yaml").write_text("")
    check_job(config)


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:1", "hpu"])
def test_devices_of_others_are_refused_by_name(name):
    with pytest.raises(UsageError, match=f"device '{name}' .*is not supported: .* say --device cpu"):
        open_device(name)


def test_rocm_calls_itself_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="AMD's GPUs .ROCm 6.4., .*: say --device cpu"):
            open_device(name)
    with pytest.warns(UserWarning, match="AMD's GPUs .*: the CPU is used"):
        assert open_device("auto").type == "cpu"
    assert device.UNTRIED


@pytest.mark.parametrize(
    "command",
    [
        "sample {run} --count 0", "sample {run} --count 1000000000000", "sample {run} --steps 0", "sample {run} --variance nan",
        "sample {run} --seed -1", "sample {run} --batch-size 0", "evaluate {run} --steps -1", "evaluate {run} --num-samples 3",
        "evaluate {run} --seed -1", "evaluate {run} --num-samples 1000000000000", "export {run} {run}/out --steps 0",
        "export {run} {run}/out --steps 100000000000", "demo {run} --count 0", "demo {run} --count 1000000",
    ],
)  # fmt: skip
def test_numbers_of_the_other_commands(command, finished_run, capsys):
    name, *arguments = command.format(run=finished_run).split()
    one_line(capsys, call(name, *arguments), 2, f"{arguments[-2]} must be")


def test_a_picture_of_four_channels(tmp_path, capsys):
    """Latents, say: there is no such PNG; their arrays can be written."""
    network = dataclasses.replace(DIGITS.network, image_channels=4)
    folder = tmp_path / "model"
    write_folder(folder, lambda f: fill_model_folder(f, network.build().state_dict(), network, DIGITS.schedule, 1))
    command = ["sample", str(folder), "--count", "2", "--device", "cpu", "--out"]
    one_line(capsys, call(*command, str(tmp_path / "a.png")), 2, "images of 4 channels are no picture", ".npz")
    assert call(*command, str(tmp_path / "a.npz")) == 0
