"""One rule for every format: labels below the network's number of classes are enough, others are refused at the start."""

from pathlib import Path

import numpy as np
import pytest

from pdfast.data import load_source
from tests.commands import TINY_RUN, call
from tests.data.archives import write_tar
from tests.data.errors import refusal
from tests.data.files import encoded, write_tfrecord

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)


def as_array(path: Path, labels: list[int]) -> Path:
    np.savez(path / "a.NPZ", images=PIXELS, labels=np.array(labels))
    return (path / "a.NPZ.npz").rename(path / "a.NPZ")


def as_folders(path: Path, labels: list[int]) -> Path:
    for label in range(max(labels) + 1):
        (path / "images" / f"{label:03}").mkdir(parents=True)
        (path / "images" / f"{label:03}" / "first.png").write_bytes(encoded(PIXELS[0, ..., 0]))
    return path / "images"


def as_list(path: Path, labels: list[int]) -> Path:
    for i, _ in enumerate(labels):
        (path / f"{i}.png").write_bytes(encoded(PIXELS[i, ..., 0]))
    (path / "labels.csv").write_text("".join(f"{i}.png,{label}\n" for i, label in enumerate(labels)))
    return path


def as_tar(path: Path, labels: list[int]) -> Path:
    members = [(f"{i}.png", encoded(PIXELS[i, ..., 0])) for i, _ in enumerate(labels)]
    return write_tar(
        path / "a.tar", dict(members + [(f"{i}.cls", b"%d" % label) for i, label in enumerate(labels)]), "w"
    )


def as_tfrecord(path: Path, labels: list[int]) -> Path:
    write_tfrecord(path / "a.tfrecord", [(encoded(PIXELS[i, ..., 0]), label) for i, label in enumerate(labels)])
    return path / "a.tfrecord"


FORMATS = [as_array, as_folders, as_list, as_tar, as_tfrecord]
LABELS = [8, *range(9), 3, 0]


@pytest.mark.parametrize("written", FORMATS)
def test_labels_below_the_networks_number_are_enough(tmp_path, written):
    source = load_source(str(written(tmp_path, LABELS)), image_size=8, channels=1, num_classes=10)
    assert source.num_classes == 9 and "9 classes" in source.description


@pytest.mark.parametrize("written", FORMATS)
def test_a_label_of_another_class_is_refused_at_the_start(tmp_path, written):
    path = written(tmp_path, LABELS)
    message = refusal(load_source, str(path), image_size=8, channels=1, num_classes=8, max_bad=1.0, names=path)
    assert "has the label 8, the network is conditioned on 8 classes, 0 to 7" in message
    assert "set --network.num-classes 9" in message
    if written is not as_folders:  # identifiers: no network has so many classes
        path = written(tmp_path, [10**6] * len(LABELS))
        message = refusal(load_source, str(path), image_size=8, channels=1, num_classes=8, max_bad=1.0, names=path)
        assert "1000001" not in message and "number the classes from 0, one after the other, and set" in message


@pytest.mark.parametrize("labels", [[1 << 31], [1 << 40], [2**64 - 1], [-5]])
def test_labels_of_an_array_that_number_no_class(tmp_path, labels):
    images = np.zeros((1, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(labels, dtype=np.uint64 if labels[0] > 0 else np.int8))
    message = refusal(load_source, str(tmp_path / "a.npz"), image_size=8, channels=1, names=tmp_path / "a.npz")
    assert f"has the label {labels[0]}: number the classes from 0" in message


@pytest.mark.filterwarnings("ignore:4 images are too few")
def test_a_run_says_which_classes_have_no_images(tmp_path, capsys):
    flags = [
        *TINY_RUN,
        "--data",
        str(as_tar(tmp_path, LABELS)),
        "--evaluation-steps",
        "1",
        "--evaluation.num-samples",
        "4",
    ]
    assert call("train", *flags, "--network.num-classes", "8", "--run", str(tmp_path / "few")) == 2
    assert "has the label 8" in capsys.readouterr().err and not (tmp_path / "few").exists()
    assert call("train", *flags, "--network.num-classes", "10", "--run", str(tmp_path / "run")) == 0
    assert "the network takes 10 classes: the data have labels below 9" in capsys.readouterr().out
