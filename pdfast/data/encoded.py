"""Encoded images on disk, by number: files in a folder, members of tar shards, records of TFRecord files.

Only where each lies is kept in memory. Nothing is unpacked: a name inside a tar is a name, never a path.
"""

import csv
import mmap
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pdfast.data.pictures import SUFFIXES, BadImage
from pdfast.errors import UsageError

TARS, TFRECORDS = {".tar"}, {".tfrecord", ".tfrecords"}
LABEL_FILE = "labels.csv"
FILES = "image files"


class EncodedImages:
    """Image i is a range of the bytes of one of `files`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        """What holds them, for people: `image files`, `tar shards`, `TFRecord files`."""
        self.files: list[Path] = []
        self.names: list[str] = []
        self.labels: np.ndarray | None = None
        """int64 [N], -1 where there is none though others have one; None where none has."""
        self.problems: dict[str, str] = {}
        """What is wrong with files that hold many, by name; what could be read of them is here."""
        self.places = np.empty((0, 3), dtype=np.int64)
        """Of each image: which file, offset, size in bytes."""
        self._found: list[tuple[int, int, int, int]] = []

    def add(self, name: str, label: int, offset: int, size: int) -> None:
        """The next image, in the last of `files`."""
        self.names.append(name)
        self._found.append((label, len(self.files) - 1, offset, size))

    def done(self) -> "EncodedImages":
        found = np.array(self._found, dtype=np.int64).reshape(-1, 4)
        self._found = []
        self.places = np.ascontiguousarray(found[:, 1:])
        self.labels = found[:, 0].copy() if (found[:, 0] >= 0).any() else None
        return self

    @property
    def description(self) -> str:
        """How many images in what, for people."""
        return f"{len(self)} {FILES}" if self.kind == FILES else f"{len(self)} images in {len(self.files)} {self.kind}"

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The bytes of image i. BadImage where they are not there any more."""
        file, offset, size = self.places[i].tolist()
        try:
            with open(self.files[file], "rb", buffering=0) as opened:
                content = os.pread(opened.fileno(), size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise BadImage("its file has become shorter")
        return content


def find_images(path: Path) -> EncodedImages | None:
    """The encoded images of a folder of image files, of tar shards or TFRecord files (with class subfolders, or a
    `labels.csv` of names and labels, for image files), or of one such file; None where `path` is no such thing.

    UsageError, in one line, where it holds no images or cannot be read.
    """
    try:
        if path.is_dir():
            for suffixes, find in ((TARS, _from_tars), (TFRECORDS, _from_tfrecords)):
                shards = sorted(f for f in path.iterdir() if f.suffix in suffixes and f.name[0] != ".")
                if shards:
                    return find(shards)
            return _from_folder(path)
        if path.suffix in TARS:
            return _from_tars([path])
        return _from_tfrecords([path]) if path.suffix in TFRECORDS else None
    except OSError as error:
        raise UsageError(f"cannot read {error.filename} ({error.strerror}): allow it, or give other data") from None


def _from_folder(folder: Path) -> EncodedImages:
    """Where the files lie in subfolders these are the classes, numbered in the order of their names; deeper folders and
    hidden files are passed over."""
    top = _image_files(folder)
    subfolders = sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
    classes = [files for child in subfolders if (files := _image_files(child))]
    label_of = _label_file(folder / LABEL_FILE)
    if top and classes:
        raise UsageError(f"{folder} has images both at its top and in subfolders: put all into class folders, or none")
    if not top and not classes:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{folder} holds no image files, directly or one folder down: give one that does ({suffixes})")
    found = EncodedImages(FILES)
    for label, files in enumerate(classes) if classes else [(-1, top)]:
        for file in files:
            name = str(file.relative_to(folder))
            if label_of is not None:
                label = label_of.get(name, -1)
            found.files.append(file)
            found.add(name, label, 0, file.stat().st_size)
    return found.done()


def _image_files(folder: Path) -> list[Path]:
    # macOS leaves a hidden ._NAME.png beside NAME.png on foreign disks, which is no image.
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file())


def _label_file(path: Path) -> dict[str, int] | None:
    if not path.exists():
        return None
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and len(rows[0]) == 2 and not rows[0][1].strip().lstrip("-").isdigit():
        rows = rows[1:]  # a header
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not row[1].strip().lstrip("-").isdigit():
            raise UsageError(f"{path}, row {number}: {','.join(row)!r} is not NAME,LABEL with a label from 0")
    return {name: int(label) for name, label in rows}


def _shards(kind: str, shards: list[Path], scan: Callable[[Path, EncodedImages], None]) -> EncodedImages:
    found = EncodedImages(kind)
    for shard in shards:
        found.files.append(shard)
        before = len(found)
        try:
            scan(shard, found)
        except (tarfile.TarError, struct.error, ValueError, IndexError, EOFError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            found.problems[str(shard)] = f"{reason}, after {len(found) - before} images"
    if not len(found):
        problem = next((f" ({name}: {reason})" for name, reason in found.problems.items()), "")
        raise UsageError(f"{shards[0].parent}: no images in {len(shards)} {kind}{problem}: give others")
    return found.done()


def _from_tars(shards: list[Path]) -> EncodedImages:
    """WebDataset: members of one name up to the first dot are a sample, of which the image and `cls`, a number, are used. An
    index of `wds2idx` beside a shard, NAME.idx, saves reading through it."""
    return _shards("tar shards", shards, _scan_tar)


def _scan_tar(shard: Path, found: EncodedImages) -> None:
    index = shard.with_suffix(".idx")
    members = _indexed(index) if index.exists() else _members(shard)
    sample, image, label = None, None, -1

    def flush() -> None:
        if image:
            found.add(f"{shard.name}/{image[0]}", label, *image[1:])

    with open(shard, "rb") as content:
        for name, offset, size in members:
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (folder, stem) != sample:
                flush()
                sample, image, label = (folder, stem), None, -1
            if f".{extension.lower().rpartition('.')[2]}" in SUFFIXES:
                image = (name, offset, size)
            elif extension == "cls":
                text = os.pread(content.fileno(), size, offset).strip()
                label = int(text) if text.isdigit() else -1
    flush()


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    end = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.isfile():
                if member.offset_data + member.size > end:
                    raise ValueError("it ends early")
                yield member.name, member.offset_data, member.size


def _indexed(index: Path) -> Iterator[tuple[str, int, int]]:
    """Lines of `extension offset size name` after the first, as DALI's wds2idx writes them."""
    lines = index.read_text().splitlines()
    for line in lines[1:]:
        fields = line.split()
        for i in range(0, len(fields), 4):
            _, offset, size, name = fields[i : i + 4]
            yield name, int(offset), int(size)


def _from_tfrecords(shards: list[Path]) -> EncodedImages:
    """Records of tf.train.Example with `image/encoded` or `image`, and, where there are classes, `image/class/label` or
    `label`, numbered from 0."""
    return _shards("TFRecord files", shards, _scan_tfrecord)


def _scan_tfrecord(shard: Path, found: EncodedImages) -> None:
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, number = 0, 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            start, end = at + 12, at + 12 + length
            if end + 4 > len(data):
                raise ValueError("it ends early")
            features = dict(_features(data, start, end))
            image = features.get("image/encoded") or features.get("image")
            label = features.get("image/class/label", features.get("label", -1))
            if not isinstance(image, tuple) or not isinstance(label, int):
                raise ValueError(f"record {number} has no `image/encoded`, but {sorted(features)}")
            found.add(f"{shard.name}/{number}", label, *image)
            at, number = end + 4, number + 1


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a protocol buffer's message; a number's own value is decoded at its start."""
    while at < end:
        key, at = _varint(data, at)
        if key & 7 == 2:
            size, at = _varint(data, at)
            yield key >> 3, at, at + size
            at += size
        elif key & 7 == 0:
            start = at
            _, at = _varint(data, at)
            yield key >> 3, start, at
        else:
            raise ValueError(f"a field of type {key & 7}, which tf.train.Example has not")


def _features(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[str, tuple[int, int] | int]]:
    """Of a tf.train.Example, each feature's name and the offset and size of its bytes, or its integer."""
    for _, features, features_end in _fields(data, start, end):
        for _, entry, entry_end in _fields(data, features, features_end):
            parts = {number: (a, b) for number, a, b in _fields(data, entry, entry_end)}
            name = data[slice(*parts[1])].decode()
            for kind, values, values_end in _fields(data, *parts[2]):
                if kind == 1:  # bytes_list
                    for _, a, b in _fields(data, values, values_end):
                        yield name, (a, b - a)
                elif kind == 3 and values_end > values:  # int64_list, its numbers packed or not
                    packed = data[values] == 0x0A
                    a = values + 2 if packed else values + 1
                    yield name, _varint(data, a)[0]
