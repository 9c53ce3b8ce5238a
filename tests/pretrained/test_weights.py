"""Weights of every format: all that the network has, of its shapes, finite, or one line that names what is wrong."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from pdfast.io.errors import UsageError
from pdfast.io.files import sha256
from pdfast.networks import NetworkConfig
from pdfast.pretrained import ConvertedConfig, adapt
from pdfast.pretrained.model_folder import fill_model_folder, load_model
from pdfast.schedule_config import ScheduleConfig
from tests.commands import TINY_GIVEN, call, rewrite_config
from tests.data.errors import refusal
from tests.networks.test_unet import perturbed
from tests.pretrained.pipelines import save, unet
from tests.pretrained.test_edm import write as write_edm

CPU = torch.device("cpu")
FORMATS = ("ours", "converted", "diffusers", "diffusers in ours", "edm", "edm in ours")


def made(kind, folder):
    """A model's folder of that format; returns its file of weights."""
    if kind == "diffusers":
        save(folder, DDPMScheduler(1000, prediction_type="v_prediction"))
        return folder / "unet/diffusion_pytorch_model.safetensors"
    if kind == "edm":
        return write_edm(folder) / "model.safetensors"
    if kind.endswith("in ours"):
        made(kind.split()[0], folder.with_name("foreign"))
        saved = load_model(folder.with_name("foreign"), CPU)
        network, schedule = saved.network, saved.schedule
    else:
        config = NetworkConfig(8, 1, 8, (1,), 1, (), 8, 16, 4, "v" if kind == "ours" else "x")
        network = perturbed((config if kind == "ours" else ConvertedConfig(config)).build())
        schedule = ScheduleConfig()
    folder.mkdir()
    fill_model_folder(folder, network.state_dict(), network.config, schedule, None)
    return folder / "teacher.safetensors"


def change(file, alter):
    """Change the weights in place, as a program would that writes them whole."""
    weights = load_file(file)
    alter(weights)
    save_file(weights, file, metadata={"format": "pt"})
    if "sha256" in (file.parent / "config.json").read_text():
        rewrite_config(file.parent, sha256=sha256(file))


def widest(weights):
    return max((name for name in weights if weights[name].dim() > 1), key=lambda name: weights[name].numel())


def _lacks(weights):
    name = widest(weights)
    del weights[name]
    return name


def _has_more(weights):
    weights["extra.weight"] = torch.zeros(3)
    return "extra.weight"


def _misshapen(weights):
    name = widest(weights)
    weights[name] = weights[name][:-1].clone()
    return str(list(weights[name].shape))


def _with(value):
    def alter(weights):
        name = widest(weights)
        weights[name].view(-1)[3] = value
        return name

    return alter


def _as(dtype):
    def alter(weights):
        name = widest(weights)
        weights[name] = weights[name].to(dtype)
        return name

    return alter


DAMAGES = {
    "missing": _lacks,
    "more": _has_more,
    "misshapen": _misshapen,
    "nan": _with(float("nan")),
    "inf": _with(float("-inf")),
    "int64": _as(torch.int64),
    "float8": _as(torch.float8_e4m3fn),
    "complex": _as(torch.complex64),
    "float64": _as(torch.float64),
}


def _renamed(weights):
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)
    return " more"


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_that_are_not_those_of_the_network_are_refused(kind, tmp_path):
    file = made(kind, tmp_path / "model")
    load_model(tmp_path / "model", CPU)
    whole = file.read_bytes()
    for damage in (*DAMAGES.values(), _renamed):
        file.write_bytes(whole)
        named = []
        change(file, lambda weights, damage=damage, named=named: named.append(damage(weights)))
        message = refusal(load_model, tmp_path / "model", CPU, names=file)
        assert named[0] in message and len(message) < 700, message


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_every_command_refuses_them(damage, tmp_path, capsys):
    """Where the weights are read: nothing is begun, drawn or written."""
    save(tmp_path / "model", DDPMScheduler(100, prediction_type="v_prediction"))
    change(tmp_path / "model/unet/diffusion_pytorch_model.safetensors", DAMAGES[damage])
    model, out = str(tmp_path / "model"), tmp_path / "out"
    run = [*TINY_GIVEN, "--rounds", "1", "--updates", "2", "--batch-size", "8", "--run", str(out)]
    for command in (
        ["sample", model, "--out", str(out / "a.png")],
        ["evaluate", model, "--data", "digits", "--features", "digits", "--num-samples", "64", "--json", str(out)],
        ["export", model, str(out)],
        ["distill", "--teacher", model, *run],
        ["distill", "--teacher", model, "--dry-run", *run],
    ):
        assert call(*command) == 2, command
        error = capsys.readouterr().err.strip()
        assert error.startswith("pdfast: error: ") and "\n" not in error and "conv" in error
        assert not out.exists()


def test_a_demo_of_students_that_are_not_finite(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    change(tmp_path / "run/students/0002/student.safetensors", DAMAGES["nan"])
    assert call("demo", str(tmp_path / "run"), "--port", "0") == 2
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [lambda p: p.fill_(float("nan")), lambda p: p[0, 0].fill_(float("inf"))])
def test_adapt_refuses_what_is_not_finite(spoil):
    network = unet()
    with torch.no_grad():
        spoil(network.conv_in.weight)
    with pytest.raises(UsageError, match=r"conv_in\.weight"):
        adapt(network, DDPMScheduler(100))


def test_adapt_refuses_other_dtypes():
    with pytest.raises(UsageError, match="float64"):
        adapt(unet().double(), DDPMScheduler(100))


@pytest.mark.parametrize("dtype, near", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_a_unet_in_half_precision_is_adapted(dtype, near):
    """Its answers are its own; the angles it is asked at stay float32, whatever it is cast to afterwards."""
    whole, half = unet(classes=3), unet(classes=3).to(dtype)
    network, schedule = adapt(half, DDPMScheduler(1000))
    z, phi, labels = (
        torch.randn(3, 1, 8, 8),
        schedule.phi(torch.tensor([0.1, 0.5, 0.77]).double()).float(),
        torch.arange(3),
    )
    with torch.no_grad():
        times = network.label(phi)
        theirs = half(z.to(dtype), times, labels).sample.float()
        assert torch.equal(network(z, phi, labels), theirs) and network(z, phi, labels).dtype == torch.float32
        full = whole(z, times, labels).sample
    assert (theirs - full).abs().max() < near * full.abs().max()
    again, _ = adapt(unet(classes=3), DDPMScheduler(1000))
    assert torch.equal(again.to(dtype).label(phi), times)


KERNELS = {"down_block_types": ("KDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "KUpBlock2D")}


def test_what_is_not_in_the_weights_is_made(tmp_path):
    """The blocks of k-diffusion filter by buffers that are in no file: as they are when such a network is made."""
    network = unet(block_out_channels=(32, 32), **KERNELS)
    theirs = {name: b.clone() for name, b in network.named_buffers()}
    assert theirs and not theirs.keys() & network.state_dict().keys()
    save(tmp_path / "pipeline", DDPMScheduler(1000, prediction_type="v_prediction"), network)
    saved = load_model(tmp_path / "pipeline", CPU)
    (tmp_path / "ours").mkdir()
    fill_model_folder(tmp_path / "ours", saved.network.state_dict(), saved.config, saved.schedule, None)
    for folder in ("pipeline", "ours"):
        buffers = dict(load_model(tmp_path / folder, CPU).network.unet.named_buffers())
        assert buffers.keys() == theirs.keys()
        assert all(torch.equal(buffers[name], theirs[name]) for name in theirs)


def loaded_equal(folder, expected, exact=True):
    weights = load_model(folder, CPU).network.unet.state_dict()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(w, expected[name], atol=0 if exact else 2e-3) for name, w in weights.items())


def pipeline(folder, **how):
    """A pipeline whose unet is saved as `how` says; returns its weights."""
    network = save(folder, DDPMScheduler(1000, prediction_type="v_prediction"))
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet", safe_serialization=True, **how)
    return {name: w.clone() for name, w in network.state_dict().items()}


def test_weights_in_shards(tmp_path):
    expected = pipeline(tmp_path, max_shard_size="60KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert UNet2DModel.from_pretrained(tmp_path / "unet").state_dict().keys() == expected.keys()
    loaded_equal(tmp_path, expected)


@pytest.mark.parametrize("shard", [None, "30KB"])
def test_weights_of_a_variant_in_fp16(shard, tmp_path):
    network = unet().half()
    how = {"variant": "fp16"} | ({"max_shard_size": shard} if shard else {})
    expected = pipeline(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    network.save_pretrained(tmp_path / "unet", **how)
    assert all("fp16" in file.name for file in (tmp_path / "unet").glob("*.safetensors"))
    loaded_equal(tmp_path, expected, exact=False)
    unet().save_pretrained(tmp_path / "unet")  # beside it the whole weights, which are preferred
    loaded_equal(tmp_path, expected)


def _index(folder):
    return folder / "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}, "secret"),
        ({"weight_map": {"conv_in.weight": "other.bin"}}, "other.bin"),
        ({"weight_map": {"conv_in.weight": 3}}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({}, "weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_an_index_that_is_none(index, words, tmp_path):
    pipeline(tmp_path, max_shard_size="60KB")
    _index(tmp_path).write_text(json.dumps(index))
    assert words in refusal(load_model, tmp_path, CPU, names=tmp_path / "unet")


def test_a_shard_that_is_missing_or_has_other_weights(tmp_path):
    pipeline(tmp_path, max_shard_size="60KB")
    index = json.loads(_index(tmp_path).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    shutil.copy(tmp_path / "unet" / first, tmp_path / "unet" / last)
    assert "index" in refusal(load_model, tmp_path, CPU, names=tmp_path / "unet")
    (tmp_path / "unet" / last).unlink()
    assert last in refusal(load_model, tmp_path, CPU, names=tmp_path / "unet")


def test_a_variant_of_another_kind_is_named(tmp_path):
    pipeline(tmp_path, variant="non_ema")
    assert "non_ema" in refusal(load_model, tmp_path, CPU, names=tmp_path / "unet")
