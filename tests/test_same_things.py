"""The same data, teacher, features and run resume however they are spelled and wherever they lie; others are refused."""

import dataclasses
import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pdfast.data import ResidentImages
from pdfast.engine.run import changed_data, open_run
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from pdfast.io.reading import load_yaml
from pdfast.recipes import DIGITS
from tests.commands import TINY_GIVEN, TINY_NETWORK, call, one_line

N = 130
ROUNDS = "--rounds 2 --updates 1 --batch-size 8 --method progressive".split()
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8)


def write_images(folder, pixels=PIXELS):
    """Uncompressed, so that all files have one size."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}.bmp")


def distill(data, run, teacher, *flags):
    return call(
        "distill", *TINY_GIVEN, *ROUNDS, "--teacher", str(teacher), "--data", str(data), "--run", str(run), *flags
    )


@pytest.fixture(scope="module")
def place(finished_run, tmp_path_factory):
    """Where a run has begun, with everything at a relative path, whose last round is yet to be done."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(finished_run / "teacher", "teacher")
        write_images(place / "images")
        assert distill("images", "run", "teacher") == 0
        shutil.rmtree("run/students/0001")
    return place


@pytest.fixture
def begun(place, tmp_path, monkeypatch):
    """The same, where it may be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_spelled_otherwise_it_is_the_same(begun, capsys):
    for data, run, teacher in (
        ("images/", "./run", "./teacher/"),
        (begun / "images", begun / "run", begun / "teacher"),
        ("../" + begun.name + "/images", "run", "teacher/../teacher"),
    ):
        assert distill(data, run, teacher) == 0, capsys.readouterr().err
        assert os.path.isfile("run/students/0001/student.safetensors")  # trained at the first, then it is finished
    assert distill("images", "run", "teacher", "--seed", "1") == 2


def test_moved_or_copied_it_is_the_same_and_the_run_says_where(begun, capsys):
    for old, new in (("images", "pictures"), ("teacher", "elsewhere/master"), ("run", "done/it")):
        os.makedirs(os.path.dirname(new) or ".", exist_ok=True)
        shutil.copytree(old, new, copy_function=shutil.copyfile)  # with times of now
        shutil.rmtree(old)
    assert distill("pictures", "done/it", "elsewhere/master") == 0
    saved = load_yaml(begun / "done/it/config.yaml")
    assert (saved["data"], saved["teacher"], saved["run"]) == ("pictures", "elsewhere/master", "done/it")
    assert "--data images" in saved["command"]
    assert call("evaluate", "done/it", "--steps", "1", "--device", "cpu") == 0


@pytest.mark.parametrize("what", ["images", "teacher"])
def test_exchanged_in_its_place_it_is_refused(what, begun, finished_run, capsys):
    if what == "images":
        sizes = [file.stat().st_size for file in (begun / "images").iterdir()]
        write_images(begun / "images", 255 - PIXELS)
        assert [file.stat().st_size for file in (begun / "images").iterdir()] == sizes
    else:
        run = begun / "other"
        train = ["--train.updates", "1", "--train.warmup", "0", "--evaluation-steps", "1", "--seed", "9", *TINY_NETWORK]
        assert call("train", *TINY_GIVEN, *train, "--run", str(run)) == 0
        shutil.rmtree("teacher")
        shutil.move(run / "teacher", "teacher")
    capsys.readouterr()
    words = {"images": "other images than those of images", "teacher": "another teacher than teacher"}
    one_line(capsys, distill("images", "run", "teacher"), 2, f"run was begun with {words[what]}: give", "--run")
    assert not os.path.exists("run/students/0001")


def as_earlier(begun):
    """What the version before wrote: a hash of names, places and sizes, at the end of the configuration."""
    files = sorted(file for file in os.listdir("images") if file.endswith(".bmp"))
    places = np.array([(i, 0, os.path.getsize(f"images/{file}")) for i, file in enumerate(files)], dtype=np.int64)
    saved = load_yaml(begun / "run/config.yaml")
    del saved["images_sha256"]
    saved["data_sha256"] = hashlib.sha256(b"8 1\n" + "\n".join(files).encode() + places.tobytes()).hexdigest()
    (begun / "run/config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))


def test_a_run_of_the_version_before_goes_on_and_knows_its_images_from_then_on(begun, capsys):
    as_earlier(begun)
    assert distill("images", "run", "teacher") == 0
    saved = load_yaml(begun / "run/config.yaml")
    assert len(saved["images_sha256"]) == 64 and "data_sha256" not in saved
    write_images(begun / "images", 255 - PIXELS)
    capsys.readouterr()
    one_line(capsys, distill("images", "run", "teacher"), 2, "run was begun with other images than those of images")
    os.rename("images/000.bmp", "images/zzz.bmp")
    as_earlier(begun)
    os.rename("images/zzz.bmp", "images/000.bmp")
    one_line(capsys, distill("images", "run", "teacher"), 2, "run was begun with other images than those of images")


def test_figures_of_exchanged_images_are_their_own(begun, capsys):
    """And `evaluate` says that the run's data are not what they were."""

    def floor():
        capsys.readouterr()
        assert call("evaluate", "run", "--steps", "2", "--device", "cpu") == 0
        said = capsys.readouterr()
        (line,) = [line for line in said.out.splitlines() if line.startswith("real images")]
        return line, said.err

    before, quiet = floor()
    assert before.startswith("real images") and not quiet
    write_images(begun / "images", np.where(np.arange(N)[:, None, None] % 2, PIXELS, 255))
    with pytest.warns(UserWarning, match="images holds other images than run was trained on") as caught:
        after, _ = floor()
    assert after != before and len(caught) == 1
    write_images(begun / "images")
    assert floor()[0] == before


def test_what_of_the_data_was_changed_is_said(tmp_path):
    images, labels = torch.zeros(2, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1])
    config, file = dataclasses.replace(DIGITS, run=tmp_path / "run"), tmp_path / "run/config.yaml"

    def begin(*data):
        with open_run(config, ResidentImages("some", *data), World(torch.device("cpu"))):
            return load_yaml(file)

    saved = begin(images, labels)
    for what, data in (("labels", (images, 1 - labels)), ("labels", (images,)), ("images", (images + 1, labels))):
        assert changed_data(saved, ResidentImages("some", *data)) == what
        with pytest.raises(UsageError, match=f"run was begun with other {what} than those of"):
            begin(*data)
    assert begin(images, labels) == saved and changed_data(saved, ResidentImages("some", images, labels)) is None
    del saved["images_alone_sha256"]  # as before it was written: it is from then on
    file.write_text(yaml.safe_dump(saved, sort_keys=False))
    with pytest.raises(UsageError, match="other images than"):
        begin(images, 1 - labels)
    assert "images_alone_sha256" in begin(images, labels)


def test_features_are_known_by_their_file(tmp_path):
    def begin(features):
        evaluation = dataclasses.replace(DIGITS.evaluation, features=str(features))
        config = dataclasses.replace(DIGITS, evaluation=evaluation, run=tmp_path / "run")
        source = ResidentImages("some", torch.zeros(2, 8, 8, 1, dtype=torch.uint8))
        with open_run(config, source, World(torch.device("cpu"))):
            return load_yaml(tmp_path / "run/config.yaml")["evaluation"]["features"]

    one, other = tmp_path / "one.pth", tmp_path / "other.pth"
    one.write_bytes(b"one")
    other.write_bytes(b"two")
    begin(one)
    one.rename(tmp_path / "moved.pth")
    assert begin(tmp_path / "moved.pth") == str(tmp_path / "moved.pth")
    other.rename(one)
    for features, words in ((one, f"other features than those of {one}: give"), ("digits", "evaluation.features = ")):
        with pytest.raises(UsageError, match=f"run was begun with {words}"):
            begin(features)
