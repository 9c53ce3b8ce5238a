"""The IDX files of Fashion-MNIST: what is read, and what each bad folder is told."""

import numpy as np
import pytest

from pdfast.data.fashion_mnist import load_fashion_mnist, parse_idx, read_part
from tests.data.archives import write_fashion, write_idx
from tests.data.errors import refusal


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pixels_and_labels(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 0, 3, 0, 2, 7], dtype=np.uint8)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", labels)
    split = read_part(tmp_path, "t10k")
    assert split.images.shape == (7, 28, 28, 1) and np.array_equal(split.images[..., 0], images)
    assert np.array_equal(split.labels, labels) and split.labels.dtype == np.int64


def test_a_missing_file_is_named(tmp_path):
    write_fashion(tmp_path, 10, 10, ".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    message = refusal(load_fashion_mnist, tmp_path, names=tmp_path)
    assert "has no t10k-labels-idx1-ubyte.gz" in message and "dataset-fashion-mnist" in message


def test_a_missing_folder_is_refused(tmp_path):
    message = refusal(load_fashion_mnist, tmp_path / "none", names=tmp_path / "none")
    assert "there is no folder" in message and "/usr/share/datasets/fashion-mnist" in message


def test_a_part_of_the_data_set_is_refused(tmp_path):
    message = refusal(load_fashion_mnist, write_fashion(tmp_path, 20, 10), names=tmp_path)
    assert "(training part) has 20 images, expected 60000" in message


def test_labels_of_another_length_are_refused(tmp_path):
    write_fashion(tmp_path, 20, 10)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(9, dtype=np.uint8))
    assert "10 t10k images and 9 labels" in refusal(read_part, tmp_path, "t10k", names=tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-9], lambda c: b"hello", lambda c: c[:30] + b"\xff" * 20 + c[50:], lambda c: c[:5]]
)
def test_a_damaged_gzip_is_named(tmp_path, damage):
    write_fashion(tmp_path, 20, 10, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert "dataset-fashion-mnist" in refusal(load_fashion_mnist, tmp_path, names=file)


def test_bad_idx_files_are_refused(tmp_path):
    write_idx(tmp_path / "a", np.zeros((2, 3, 4), dtype=np.uint8))
    good = (tmp_path / "a").read_bytes()
    assert parse_idx(good, 3, "a").shape == (2, 3, 4)
    for content in (b"", good[:15], b"\0\0\x0d\x03" + good[4:], b"\x1f\x8b" + good[2:]):
        assert "is not an IDX file of bytes with 3 axes" in refusal(parse_idx, content, 3, "x-ubyte", names="x-ubyte")
    assert "is not an IDX file of bytes with 1 axes" in refusal(parse_idx, good, 1, "x-ubyte", names="x-ubyte")
    for content in (good[:-1], good + b"\0", good[:16]):
        message = refusal(parse_idx, content, 3, "x-ubyte", names="x-ubyte")
        assert f"has {len(content) - 16} bytes for an array of shape (2, 3, 4)" in message
