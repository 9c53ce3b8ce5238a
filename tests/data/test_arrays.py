"""Images in .npy and .npz files: what is read, and what each bad file is told."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pdfast.data.arrays import load_array_file
from tests.data.errors import refusal

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 3, 1, 1, 2, 0])


def saved(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> Path:
    (np.save if path.suffix == ".npy" else np.savez)(path, *arrays, **named)
    return path


def test_npy(tmp_path):
    images, labels = load_array_file(saved(tmp_path / "a.npy", IMAGES))
    assert np.array_equal(images, IMAGES) and images.dtype == np.uint8 and labels is None


def test_npy_without_a_channel_axis(tmp_path):
    images, _ = load_array_file(saved(tmp_path / "a.npy", IMAGES[..., 0]))
    assert np.array_equal(images, IMAGES[..., :1])


def test_npy_in_another_memory_order(tmp_path):
    images, _ = load_array_file(saved(tmp_path / "a.npy", np.asfortranarray(IMAGES)))
    assert np.array_equal(images, IMAGES) and images.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "u8"])
def test_npz_with_labels(tmp_path, dtype):
    path = saved(tmp_path / "a.npz", images=IMAGES, labels=LABELS.astype(dtype), other=LABELS)
    images, labels = load_array_file(path)
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, LABELS) and labels.dtype == np.int64 and labels.dtype.isnative


def test_npz_without_labels(tmp_path):
    images, labels = load_array_file(saved(tmp_path / "a.npz", images=IMAGES))
    assert np.array_equal(images, IMAGES) and labels is None


@pytest.mark.parametrize("name, labels", [("label", LABELS), ("y", LABELS[:, None].astype(np.uint8))])
def test_labels_of_another_name_are_not_passed_over_in_silence(tmp_path, name, labels):
    path = saved(tmp_path / "a.npz", images=IMAGES, more=LABELS[:3], **{name: labels})
    with pytest.warns(
        UserWarning, match=f"has no array `labels`, but .*: if `{name}` has the labels, save it under that name"
    ):
        assert load_array_file(path)[1] is None


def test_npz_of_a_single_array(tmp_path):
    for path in (saved(tmp_path / "a.npz", IMAGES), saved(tmp_path / "b.npz", data=IMAGES)):
        images, labels = load_array_file(path)
        assert np.array_equal(images, IMAGES) and labels is None


@pytest.mark.parametrize(
    "arrays, expected",
    [
        ({"images": IMAGES / 255}, "dtype float64: convert them to uint8"),
        ({"images": IMAGES.astype(np.float32)}, "dtype float32: convert them to uint8"),
        ({"images": IMAGES[0, 0]}, "shape (5, 3): make it [N, H, W, C]"),
        ({"images": IMAGES[None]}, "shape (1, 6, 4, 5, 3): make it [N, H, W, C]"),
        ({"images": np.uint8(3)}, "shape (): make it [N, H, W, C]"),
        ({"images": IMAGES[:0]}, "holds no images"),
        ({"images": IMAGES[:, :0]}, "holds no images"),
        (
            {"images": IMAGES, "labels": LABELS[:5]},
            "labels of shape (5,) for 6 images: give one label an image, as (6,)",
        ),
        ({"images": IMAGES, "labels": LABELS[:, None]}, "labels of shape (6, 1) for 6 images"),
        ({"images": IMAGES, "labels": LABELS - 1}, "has the label -1: number the classes from 0"),
        ({"images": IMAGES, "labels": LABELS.astype(np.uint64) - np.uint64(1)}, "has the label 18446744073709551615"),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels of dtype float64: number the classes from 0"),
        ({"images": IMAGES, "labels": LABELS > 0}, "labels of dtype bool"),
        (
            {"y": LABELS, "x": IMAGES},
            "has no array `images`, but `x` (uint8 [6, 4, 5, 3]), `y` (int64 [6]): save the images under that name, and their labels, "
            "where there are some, as `labels`",
        ),
        ({f"x{i}" * 99: LABELS for i in range(99)}, "` (int64 [6]), ...: save"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, arrays, expected):
    path = saved(tmp_path / "a.npz", **arrays)
    assert expected in refusal(load_array_file, path, names=path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # NumPy's, on saving objects
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickles_are_refused_and_not_run(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    path = saved(tmp_path / name, np.array([Trap()], dtype=object))
    message = refusal(load_array_file, path, names=path)
    assert "Python objects" in message and "make it again with numpy.save" in message and "allow_pickle" not in message
    assert not (tmp_path / "sprung").exists()


def whole(suffix: str) -> bytes:
    content = io.BytesIO()
    np.save(content, IMAGES) if suffix == ".npy" else np.savez_compressed(content, images=IMAGES, labels=LABELS)
    return content.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:50], lambda c: c[:-20], lambda c: b"no array, but text\n" * 9]
)
def test_damaged_files_are_refused(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(whole(suffix)))
    message = refusal(load_array_file, path, names=path)
    assert message.startswith(f"cannot read {path} (") and "make it again with numpy.save" in message


def test_a_flipped_byte_in_an_npz_is_refused(tmp_path):
    content = bytearray(whole(".npz"))
    content[len(content) // 2] ^= 0xFF
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    assert f"cannot read {path}" in refusal(load_array_file, path, names=path)


def test_an_archive_of_other_files_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", "text")
    assert "other files than arrays" in refusal(load_array_file, path, names=path)


def test_an_empty_archive_is_refused(tmp_path):
    path = saved(tmp_path / "a.npz")
    assert "no array `images`, but none at all" in refusal(load_array_file, path, names=path)
