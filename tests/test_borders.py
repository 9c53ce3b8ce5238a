"""What the engine hands on without looking into it: conditions that are trees, images that are not square, codecs, z of any shape."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pdfast.data.codec import Pixels
from pdfast.data.pictures import decode
from pdfast.diffusion import Cosine, ancestral, angles, build_step_table, map_condition, noise, sample, tensors_of
from pdfast.diffusion.condition import check_cond
from pdfast.loss import distillation_loss
from pdfast.networks import NetworkConfig, UNet
from pdfast.pretrained import adapt
from tests.commands import TINY_DISTILL, call
from tests.data.files import encoded
from tests.data.test_loaders import LOADERS, opened


class Pair(NamedTuple):
    one: torch.Tensor
    other: object


def test_a_tree_is_of_any_kind_and_keeps_it():
    t = torch.arange(3)
    tree = {"a": t, "b": [t, None, ("text", t)], "c": Pair(t, {"d": t}), "g": 2.0}
    doubled = map_condition(lambda tensor: 2 * tensor, tree)
    assert [leaf.tolist() for leaf in tensors_of(doubled)] == [[0, 2, 4]] * 5
    assert doubled["b"][1] is None and doubled["b"][2][0] == "text" and doubled["g"] == 2.0
    assert isinstance(doubled["c"], Pair) and isinstance(doubled["b"], list)
    check_cond(tree, 3)
    with pytest.raises(ValueError, match=r"cond has shape \(3,\): there are 4 samples"):
        check_cond(tree, 4)


def weights(run):
    return [load_file(file) for file in sorted(run.glob("*/**/*.safetensors"))]


@pytest.mark.filterwarnings("ignore:64 images are too few")
def test_a_condition_that_is_a_dict_trains_and_samples_as_its_labels_do(tmp_path, monkeypatch):
    """A network that takes its classes out of a tree: teacher, rounds in micro-batches, evaluation and samples, bit for bit."""
    flags = [*TINY_DISTILL, "--network.num-classes", "10", "--engine.micro-batches", "2"]
    asked = []

    def of_labels(config, cond, guidance=None):
        return {"image": {"class": cond}, "size": (torch.ones(len(cond), 2), None)}

    forward = UNet.forward

    def of_tree(network, z, phi, cond=None):
        asked.append(cond["size"][0].shape == (len(z), 2))
        return forward(network, z, phi, cond["image"]["class"])

    def course(run):
        assert call("distill", *flags, "--run", str(run)) == 0
        out = str(run / "a.npz")
        assert call("sample", str(run), "--count", "4", "--seed", "3", "--out", out, "--device", "cpu") == 0
        assert call("evaluate", str(run), "--json", str(run / "e.json"), "--device", "cpu") == 0
        rows = json.loads((run / "e.json").read_text())["evaluation"]
        return weights(run), np.load(out), [row["fd"] for row in rows]

    expected = course(tmp_path / "labels")
    monkeypatch.setattr(NetworkConfig, "condition", of_labels)
    monkeypatch.setattr(UNet, "forward", of_tree)
    found = course(tmp_path / "tree")
    assert all(asked) and len(asked) > 40
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert np.array_equal(found[1]["images"], expected[1]["images"]) and found[2] == expected[2]
    assert found[1]["labels"].tolist() == [0, 1, 2, 3]


class Means(torch.nn.Module):
    """Features of images of any size: their means by channel and quarter."""

    name, num_features, natural, sha256 = "FD-means", 4, False, "none"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    def logits(self, features):
        return features


@pytest.mark.filterwarnings("ignore")  # of few images, and diffusers' own
def test_images_that_are_not_square(tmp_path, monkeypatch, capsys):
    """8 x 16: trained, distilled, evaluated, drawn, exported; diffusers draws the same."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 16, 1), dtype=np.uint8)
    np.save(tmp_path / "wide.npy", images)
    run = tmp_path / "run"
    flags = [*TINY_DISTILL, "--network.image-width", "16", "--network.channel-mult", "1", "2", "--data"]
    flags += [str(tmp_path / "wide.npy"), "--evaluation.features", "mobilenet", "--evaluation.num-samples", "8"]
    monkeypatch.setattr("pdfast.evaluation.evaluator.load_feature_space", lambda *_, **__: Means())
    monkeypatch.setattr("pdfast.checks.check_feature_space", lambda *_, **__: None)
    assert call("distill", *flags, "--run", str(run)) == 0
    assert np.load(run / "teacher/samples.npy").shape[1:] == (8, 16, 1)
    assert call("sample", str(run), "--count", "2", "--out", str(tmp_path / "a.png"), "--device", "cpu") == 0
    assert call("export", str(run), str(tmp_path / "out"), "--device", "cpu") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "8x16 images" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["sample_size"] == [8, 16], said


class Unshuffled(Pixels):
    """z is [n, 4 C, H/2, W/2]: four neighbouring pixels are channels of one place."""

    def data_shape(self, z_shape):
        channels, height, width = z_shape
        return 2 * height, 2 * width, channels // 4

    def diffuse(self, *of_batch):
        return pixel_unshuffle(super().diffuse(*of_batch), 2)

    def encode(self, x):
        return pixel_unshuffle(super().encode(x), 2)

    def decode(self, z):
        return super().decode(pixel_shuffle(z, 2))


def test_a_codec_stands_between_images_and_z(tmp_path, monkeypatch, capsys):
    """Networks of [4, 4, 4] train on digits of [8, 8, 1], which is what is measured and shown."""
    monkeypatch.setattr("pdfast.data.codec.PIXELS", Unshuffled())
    flags = [*TINY_DISTILL, "--network.image-size", "4", "--network.image-channels", "4"]
    run = tmp_path / "run"
    assert call("distill", *flags, "--run", str(run)) == 0
    assert np.load(run / "students/0001/samples.npy").shape[1:] == (8, 8, 1)
    assert json.loads((run / "students/0001/metrics.json").read_text())["data"]["shape"] == [8, 8, 1]
    out = tmp_path / "a.png"
    assert call("sample", str(run), "--count", "1", "--out", str(out), "--device", "cpu") == 0, capsys.readouterr().err
    assert out.exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_files_become_images_that_are_not_square(tmp_path, loader):
    """The centre of what covers them, as Pillow has it; those that lie on their side too."""
    (tmp_path / "files").mkdir()
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate(((20, 20), (9, 40), (40, 9), (12, 24))):
        values = np.kron(generator.integers(0, 256, (height, width, 3)), np.ones((2, 2, 1))).astype(np.uint8)
        (tmp_path / f"files/{i}.png").write_bytes(encoded(values))
    found = opened(tmp_path / "files", loader, size=(6, 12)).take(torch.arange(4)).x
    assert found.shape == (4, 6, 12, 3)
    for i in range(4):
        expected = decode((tmp_path / f"files/{i}.png").read_bytes(), (6, 12), 3)
        assert np.array_equal(found[i].numpy(), expected)


class Linear(torch.nn.Module):
    """o = w z + sin(phi), of any shape."""

    prediction = "v"

    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def forward(self, z, phi, cond=None):
        return self.w * z + torch.sin(phi).view(-1, *(1,) * (z.dim() - 1))


@pytest.mark.parametrize("shape", [(2,), (3, 5), (2, 3, 4, 5)], ids=["points", "sequence", "video"])
def test_z_of_any_shape(shape):
    """Each element on its own: as images of one pixel a channel would be."""
    student, teacher, table = Linear(0.3), Linear(0.2), build_step_table(Cosine(), 4, "v", "snr")
    key = noise.key(0, noise.Stream.NOISE)
    x, eps = (noise.normal(key, torch.arange(6) + i, shape) for i in (0, 6))
    assert x.shape == (6, *shape)
    k = torch.arange(6) % 4 + 1
    flat = [t.reshape(6, -1, 1, 1) for t in (x, eps)]
    ours = distillation_loss(student, teacher, x, table, k=k, eps=eps)
    theirs = distillation_loss(student, teacher, flat[0], table, k=k, eps=flat[1])
    torch.testing.assert_close(ours, theirs)
    drawn, expected = (sample(student, z, Cosine(), 4).reshape(6, -1) for z in (x, flat[0]))
    torch.testing.assert_close(drawn, expected)
    phi = angles(Cosine(), 4)
    by_ancestral = [ancestral(student, z, phi, lambda i, z=z: z) for z in (x, flat[0])]
    torch.testing.assert_close(by_ancestral[0].reshape(6, -1), by_ancestral[1].reshape(6, -1))


def test_a_network_of_diffusers_that_is_not_square():
    from diffusers import DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    unet = UNet2DModel(sample_size=(8, 16), in_channels=1, out_channels=1, **small, **blocks).eval()
    network, schedule = adapt(unet, DDPMScheduler(1000))
    assert network.config.image_shape == (1, 8, 16)
    z, phi = torch.randn(2, 1, 8, 16), schedule.phi(torch.full((2,), 0.5, dtype=torch.float64)).float()
    with torch.no_grad():
        torch.testing.assert_close(network(z, phi), unet(z, 499).sample, rtol=1e-3, atol=1e-4)
