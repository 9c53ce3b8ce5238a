"""The real images' statistics: kept on disk, read again for these very images alone, and replaced where they are damaged."""

import errno
import json
import warnings

import pytest
import torch
from torch import Tensor, nn

from pdfast.data import ResidentImages
from pdfast.data.source import Hashes, Identity
from pdfast.engine.world import World
from pdfast.evaluation import real
from pdfast.evaluation.metrics import Comparison, split_real
from pdfast.evaluation.real import RealImages
from pdfast.io.errors import UsageError
from tests.engine.processes import run

ALONE = World(torch.device("cpu"))
N = 40


class Pixels(nn.Module):
    """The feature space of the pixels themselves."""

    name, sha256, num_features, natural = "FD-pixels", "0" * 64, 12, False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        """Images of which it computed the features."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1).float()

    def logits(self, features: Tensor) -> Tensor:
        return features[:, :4] / 50


def images_of(n: int, seed: int) -> Tensor:
    """uint8 [n, 2, 2, 3]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 2, 2, 3), dtype=torch.uint8, generator=generator)


def source(seed: int = 0) -> ResidentImages:
    return ResidentImages("images", images_of(100, seed))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def everything(real_images: RealImages) -> tuple:
    """All that it says, of itself and of other images."""
    figures = real_images.figures(real_images.features(images_of(30, 5).permute(0, 3, 1, 2)))
    return figures, real_images.against_real, real_images.channel_mean, real_images.channel_std


def test_what_it_says(cache):
    images = source()
    reference, held_out = (images.take(i).x.permute(0, 3, 1, 2) for i in split_real(100, N, seed=0))
    space = Pixels()
    comparison = Comparison(space, space(reference))
    figures, against_real, mean, std = everything(RealImages(images, space, N, ALONE, batch_size=7))
    assert figures == pytest.approx(comparison.figures(space(images_of(30, 5).permute(0, 3, 1, 2))))
    assert against_real == pytest.approx(comparison.figures(space(held_out)))
    values = reference.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist()) and len(std) == 3


def test_next_to_all_images(cache):
    """As published FIDs are: whatever n is, and without a floor."""
    for computed in (100, 0):
        space = Pixels()
        real_images = RealImages(source(), space, 3 * N, ALONE, reference="all")
        assert space.seen == computed and real_images.against_real is None
    figures, _, _, _ = everything(real_images)
    real = source().take(split_real(100, N, seed=0, reference="all")[0]).x.permute(0, 3, 1, 2)
    drawn = images_of(30, 5).permute(0, 3, 1, 2)
    assert figures == pytest.approx(Comparison(space, space(real)).figures(space(drawn)))


def test_the_second_time_nothing_is_computed(cache):
    first, second = Pixels(), Pixels()
    images = RealImages(source(), first, N, ALONE)
    assert first.seen == 2 * N
    again = RealImages(source(), second, N, ALONE)
    assert second.seen == 0
    assert everything(again) == everything(images)
    assert len(list(cache.iterdir())) == 1, "one file, and none that was being written"


def test_other_images_another_space_and_another_number_are_not_the_same(cache):
    class Other(Pixels):
        sha256 = "1" * 64

    for images, space, n in [(source(), Pixels(), N), (source(1), Pixels(), N), (source(), Other(), N), (source(), Pixels(), 41)]:  # fmt: skip
        RealImages(images, space, n, ALONE)
        assert space.seen == 2 * n
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("changed", ["compared with", "the others"])
def test_one_other_image_among_those_compared_is_noticed(cache, changed):
    """Whatever a source says of itself, as one does that has not read all its images."""
    images = images_of(100, 0)
    parts = dict(zip(("compared with", "the others"), split_real(100, N, seed=0), strict=True))
    said = []
    for value in (0, 255):
        images[parts[changed][7]] = value
        exchanged = ResidentImages("images", images)
        exchanged.identity = Identity(lambda: Hashes("0" * 64, "0" * 64))
        space = Pixels()
        said.append(everything(RealImages(exchanged, space, N, ALONE)))
        assert space.seen == 2 * N + 30
    assert said[0] != said[1]
    images[list(set(range(100)) - {int(i) for part in parts.values() for i in part})] = 0  # of no other figure
    space = Pixels()
    assert everything(RealImages(ResidentImages("images", images), space, N, ALONE)) == said[1] and space.seen == 30


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "a feature", "a fact", "another's"])
def test_a_damaged_file_is_replaced_with_one_warning(cache, damage):
    said = everything(RealImages(source(), Pixels(), N, ALONE))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    if damage == "another's":
        RealImages(source(1), Pixels(), N, ALONE)
        (other,) = set(cache.iterdir()) - {path}
        path.write_bytes(other.read_bytes())
    else:
        fact = content.index(b"precision")
        path.write_bytes(
            {
                "cut": content[:-100],
                "empty": b"",
                "garbage": b"no safetensors",
                "a feature": content[:-10] + b"\x01" + content[-9:],
                "a fact": content[:fact] + content[fact:].replace(b".", b"0", 1),
            }[damage]
        )
        assert path.read_bytes() != content
    space = Pixels()
    with pytest.warns(UserWarning) as caught:
        again = RealImages(source(), space, N, ALONE)
    assert [str(w.message) for w in caught] == [f"{path} is damaged or not readable: its features are computed again"]
    assert space.seen == 2 * N and everything(again) == said
    space = Pixels()
    assert everything(RealImages(source(), space, N, ALONE)) == said and space.seen == 30


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PDFAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="could not be kept in .*: set PDFAST_CACHE to another folder") as caught:
        images = RealImages(source(), Pixels(), N, ALONE)
    assert len(caught) == 1 and images.against_real["fd"] > 0


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="could not be kept"):
        RealImages(source(), Pixels(), N, ALONE)
    assert list(cache.iterdir()) == []


def test_the_folder_is_in_the_home_unless_said(monkeypatch):
    monkeypatch.delenv("PDFAST_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(real.cache_folder()) == "/home/someone/.cache/pdfast"


def warnings_of(space: nn.Module, n: int, world: World = ALONE) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RealImages(source(), space, n, world)
    return [str(w.message) for w in caught]


def test_one_warning_of_few_images(cache, monkeypatch):
    class Natural(Pixels):
        natural = True

    assert warnings_of(Pixels(), 13) == []
    for space in (Pixels(), Natural()):
        (message,) = warnings_of(space, 12)
        assert "12 images are too few for the 12 features of FD-pixels" in message
    (message,) = warnings_of(Natural(), 13)
    assert "13 images are few for FD-pixels: below 10000" in message
    monkeypatch.setattr(real, "ENOUGH", 13)
    assert warnings_of(Natural(), 13) == []


def test_fewer_images_than_neighbours_are_refused(cache):
    with pytest.raises(UsageError, match=r"--evaluation.num-samples must be at least 4, got 3: precision and recall"):
        RealImages(source(), Pixels(), 3, ALONE)
    with pytest.warns(UserWarning, match="too few"):
        least = RealImages(source(), Pixels(), 4, ALONE).against_real
    assert [name for name, value in least.items() if value is None] == ["kd_std"]


def test_the_same_in_several_processes(cache):
    """Of a number that they do not divide: the figures of one, in both of them; the second time of what the first kept."""
    expected = list(everything(RealImages(source(), Pixels(), 41, ALONE)))
    for path in cache.iterdir():
        path.unlink()
    text = run(2, "-m", "tests.evaluation.evaluated", PDFAST_CACHE=str(cache))
    said = [json.loads(line) for line in text.splitlines() if line.startswith("[{")]
    assert said == 2 * [[{"seen": 42, "said": expected}, {"seen": 0, "said": expected}]]
