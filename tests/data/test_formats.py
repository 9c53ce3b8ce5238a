"""Where encoded images lie: folders, tar shards with and without an index, TFRecord files, and what each bad one is told."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pdfast.data import load_source
from pdfast.data.formats import find_images
from pdfast.data.pictures import BadImage, decode
from tests.data.archives import write_tar
from tests.data.errors import refusal
from tests.data.files import encoded, field, record_of, solid, write_index, write_tfrecord


def grey(value: int) -> bytes:
    return encoded(np.full((4, 4), value, dtype=np.uint8))


def values(path: Path) -> list[int]:
    """The grey value of each image."""
    found = find_images(path)
    return [int(decode(found.read(i), 4, 1)[0, 0, 0]) for i in range(len(found))]


def labels(path: Path) -> list[int] | None:
    found = find_images(path).labels
    return None if found is None else found.tolist()


def test_every_format_in_the_order_of_the_names(tmp_path):
    for i, name in enumerate(["a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp", "f.gif"]):
        lossless = {"lossless": True} if name.endswith("webp") else {}
        solid(tmp_path / name, (40 * i, 40 * i, 40 * i), **lossless)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_text("what macOS leaves behind")
    assert labels(tmp_path) is None
    assert np.abs(np.array(values(tmp_path)) - 40 * np.arange(6)).max() <= 1


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for path, value in {"dog/2.png": 4, "dog/1.png": 3, "cat/1.png": 1, "cat/2.png": 2, "emu/1.png": 5}.items():
        solid(tmp_path / path, value, "L")
    solid(tmp_path / ".hidden" / "1.png", 9, "L")
    solid(tmp_path / "__MACOSX" / "cat" / "._1.png", 9, "L")
    (tmp_path / "readme.txt").write_text("no class")
    assert values(tmp_path) == [1, 2, 3, 4, 5] and labels(tmp_path) == [0, 0, 1, 1, 2]
    assert find_images(tmp_path).names[2] == "dog/1.png"


@pytest.mark.parametrize("header", ["", "name,label\n"])
def test_a_file_of_labels(tmp_path, header):
    for name in ("a", "b", "c"):
        solid(tmp_path / f"{name}.png", 1, "L")
    (tmp_path / "labels.csv").write_text(f"{header}c.png,7\na.png,0\n")
    assert labels(tmp_path) == [0, -1, 7]
    (tmp_path / "labels.csv").write_text("a.png,0\nb.png,cat\n")
    assert "row 2: 'b.png,cat' is not NAME,LABEL" in refusal(find_images, tmp_path, names=tmp_path / "labels.csv")


SAMPLES = {
    "one/0001.png": grey(10),
    "one/0001.cls": b"3",
    "one/0001.json": b"{}",
    "one/0002.cls": b" 4\n",
    "one/0002.png": grey(20),
    "two/0002.seg.png": grey(30),
    "notes.txt": b"no image",
}


@pytest.mark.parametrize("index", [False, True])
def test_tar_shards(tmp_path, index):
    write_tar(tmp_path / "a.tar", SAMPLES, "w")
    write_tar(tmp_path / "b.tar", {"../../evil.png": grey(40), "/etc/passwd.png": grey(50)}, "w")
    if index:
        write_index(tmp_path / "a.tar")
    assert values(tmp_path) == [10, 20, 30, 40, 50] and labels(tmp_path) == [3, 4, -1, -1, -1]
    assert (
        find_images(tmp_path).names[3] == "b.tar/../../evil.png" and not (tmp_path.parent.parent / "evil.png").exists()
    )
    assert values(tmp_path / "a.tar") == [10, 20, 30]


def test_a_broken_tar_gives_what_is_whole(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": grey(i) for i in range(5)}, "w")
    write_tar(tmp_path / "b.tar", {"9.png": grey(9)}, "w")
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: 3 * 1024 + 512 + 10])
    assert values(tmp_path) == [0, 1, 9]
    (problem,) = find_images(tmp_path).problems.items()
    assert problem[0] == str(tmp_path / "a.tar") and problem[1].endswith(", after 2 images")
    (tmp_path / "a.tar").write_bytes(b"hello")
    (tmp_path / "b.tar").unlink()
    assert "no images in 1 tar shards" in refusal(find_images, tmp_path, names=tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_tfrecord_files(tmp_path, packed):
    assert record_of(b"")[8:12].hex() == "29039807"  # as TensorFlow writes it
    write_tfrecord(tmp_path / "a.tfrecord", [(grey(1), 0), (grey(2), 300)], packed=packed)
    write_tfrecord(tmp_path / "b.tfrecord", [(grey(3), None)], packed=packed)
    assert values(tmp_path) == [1, 2, 3] and labels(tmp_path) == [0, 300, -1]
    content = (tmp_path / "a.tfrecord").read_bytes()
    second = 16 + struct.unpack_from("<Q", content)[0]
    for damaged, problem in (
        (content[:-20], "it ends early"),
        (content[: second + 9], "it ends early"),
        (
            content[:second] + bytes([content[second] ^ 4]) + content[second + 1 :],
            "the length of record 1 does not have its checksum",
        ),
    ):
        (tmp_path / "a.tfrecord").write_bytes(damaged)
        assert values(tmp_path) == [1, 3]
        assert find_images(tmp_path).problems == {str(tmp_path / "a.tfrecord"): f"{problem}, after 1 images"}


def record(**features: bytes) -> bytes:
    """A TFRecord of one tf.train.Example, of features as they are encoded."""
    entries = b"".join(field(1, field(1, k.replace("_", "/").encode()) + field(2, v)) for k, v in features.items())
    return record_of(field(1, entries))


IMAGE = field(1, field(1, grey(5)))
MINUS_ONE = b"\xff" * 9 + b"\x01"


@pytest.mark.parametrize(
    "label, expected",
    [
        (field(3, field(1, MINUS_ONE)), -1),  # as TFDS writes none
        (field(3, b"\x08" + MINUS_ONE), -1),
        (field(3, field(1, b"\x80" * 8 + b"\x80\x01")), -1),  # -2^63
        (field(3, field(1, b"")), -1),
        (field(3, b""), -1),
        (field(3, field(1, b"\x01\x02")), -1),  # two of them
        (field(3, field(1, b"\x07" * 200)), -1),
        (field(1, field(1, b"cat")), -1),
        (field(2, field(1, bytes(4))), -1),
        (field(3, field(1, b"\x80\x80\x00")), 0),
    ],
)
def test_labels_of_a_tfrecord(tmp_path, label, expected):
    write_tfrecord(tmp_path / "a.tfrecord", [(grey(1), 6)])
    (tmp_path / "b.tfrecord").write_bytes(record(image_encoded=IMAGE, image_class_label=label))
    assert values(tmp_path) == [1, 5] and labels(tmp_path) == [6, expected]


@pytest.mark.parametrize("label", [1 << 31, (1 << 63) - 1])
def test_a_label_of_a_tfrecord_that_numbers_no_class(tmp_path, label):
    write_tfrecord(tmp_path / "a.tfrecord", [(grey(1), 6), (grey(1), label)])
    message = refusal(find_images, tmp_path, names=tmp_path / "a.tfrecord")
    assert f"a.tfrecord/1 has the label {label}: number the classes from 0" in message


def test_a_record_of_two_images_is_a_problem(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", [(grey(1), 6)])
    (tmp_path / "b.tfrecord").write_bytes(record(image_encoded=field(1, field(1, grey(1)) + field(1, grey(2)))))
    assert find_images(tmp_path).problems == {str(tmp_path / "b.tfrecord"): "record 0 has 2 images, after 0 images"}


def test_names_of_features_that_are_not_utf_8(tmp_path):
    entry = field(1, field(1, b"caf\xe9") + field(2, IMAGE)) + field(1, field(1, b"image") + field(2, IMAGE))
    (tmp_path / "a.tfrecord").write_bytes(record_of(field(1, entry)))
    assert values(tmp_path) == [5]


@pytest.mark.parametrize("name", ["x-train.tfrecord-00000-of-00002", "a.tfrec", "A.TFRECORD", "a.TfRecords"])
def test_names_of_tfrecord_files(tmp_path, name):
    write_tfrecord(tmp_path / name, [(grey(1), 0)])
    assert values(tmp_path) == values(tmp_path / name) == [1]


@pytest.mark.parametrize("name", ["a.tar", "b.TFREC", "c.npz", "d.npy"])
@pytest.mark.parametrize("image", ["1.png", "cat/1.png"])
def test_what_would_hide_images_is_refused(tmp_path, name, image):
    solid(tmp_path / image, 1, "L")
    (tmp_path / name).write_bytes(b"")
    message = refusal(find_images, tmp_path, names=tmp_path)
    assert f"({name}) and 1 image files (1.png): it is not clear which" in message
    (tmp_path / name).rename(tmp_path / f".{name}")
    assert values(tmp_path) == [1]


def test_tars_and_tfrecords_are_not_mixed(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": grey(1)}, "w")
    write_tfrecord(tmp_path / "a.tfrecord", [(grey(1), 0)])
    message = refusal(find_images, tmp_path, names=tmp_path)
    assert "holds 1 tar shards (a.tar) and 1 TFRecord files (a.tfrecord): it is not clear" in message


def test_a_folder_of_arrays_says_to_name_one(tmp_path):
    for name in ("a.npy", "b.npz"):
        (tmp_path / name).write_bytes(b"")
    assert f"name one, such as {tmp_path / 'a.npy'}" in refusal(find_images, tmp_path, names=tmp_path)


def test_of_other_files_it_says_what_is_there(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.webm").write_bytes(b"")
    (tmp_path / "notes.TXT").write_text("")
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / ".hidden.tif").write_text("")
    (tmp_path / "scans" / "old").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "scans" / f"{i}.tif").write_bytes(b"")
    assert "only 4 .webm, 2 .tif" in refusal(find_images, tmp_path, names=tmp_path)
    message = refusal(find_images, tmp_path / "scans" / "old", names="old")
    assert "holds no image files, directly or one folder down, only nothing" in message


def test_an_empty_class_is_refused_by_name(tmp_path):
    """Left out, `boa` would give its number to `cat`."""
    solid(tmp_path / "ant" / "1.png", 1, "L")
    solid(tmp_path / "cat" / "1.png", 1, "L")
    (tmp_path / "boa").mkdir()
    (tmp_path / "boa" / "1.tif").write_bytes(b"")
    message = refusal(find_images, tmp_path, names=tmp_path / "boa")
    assert "holds no image files, only 1 .tif, and all subfolders are classes" in message
    (tmp_path / "eel" / "1.png").mkdir(parents=True)
    assert "(1 more subfolders neither)" in refusal(find_images, tmp_path, names=tmp_path / "boa")


def test_what_is_no_such_data(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert find_images(tmp_path / "notes.txt") is None


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 5000 + ".tar", "a" * 5000 + ".npz"])
def test_a_name_that_no_file_can_have(name):
    message = refusal(load_source, name, image_size=8, channels=1, names=name)
    assert "(File name too long): allow it, or give other data" in message
    assert "File name too long" in refusal(find_images, Path(name), names=name)


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a.tar", "a.tfrecord", "a.npz", "a.png"):
        os.mkfifo(tmp_path / name)
        assert "not data that pdfast reads" in refusal(
            load_source, str(tmp_path / name), image_size=8, channels=1, names=name
        )
    assert "only 1 .npz, 1 .png, 1 .tar, 1 .tfrecord" in refusal(find_images, tmp_path, names=tmp_path)


def test_a_file_that_disappears_or_shrinks(tmp_path):
    solid(tmp_path / "a.png", 1, "L")
    solid(tmp_path / "b.png", 1, "L")
    found = find_images(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(b"x")
    for i, reason in enumerate(["cannot be read: No such file", "has become shorter"]):
        with pytest.raises(BadImage, match=reason):
            found.read(i)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    solid(tmp_path / "train" / "cat" / "1.png", 1, "L")
    message = refusal(find_images, tmp_path, names=tmp_path)
    assert (
        "directly or one folder down, only 1 .txt, 1 deeper folders, 1 folders: give" in message and ".png" in message
    )


def test_a_mixed_folder_is_refused(tmp_path):
    solid(tmp_path / "1.png", 1, "L")
    solid(tmp_path / "cat" / "1.png", 1, "L")
    message = refusal(find_images, tmp_path, names=tmp_path)
    assert "both at its top and in subfolders" in message and "put all into class folders, or none" in message


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    listing = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    message = refusal(find_images, tmp_path, names=tmp_path / "secret")
    assert "(Permission denied): allow it, or give other data" in message
