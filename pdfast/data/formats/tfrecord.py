"""TFRecord files of tf.train.Example, read without TensorFlow."""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from pdfast.data.encoded import EncodedImages
from pdfast.data.formats.shards import scan_shards

TFRECORDS = {".tfrecord", ".tfrecords"}


def from_tfrecords(shards: list[Path]) -> EncodedImages:
    """Records of tf.train.Example with `image/encoded` or `image`, and, where there are classes, `image/class/label` or
    `label`, numbered from 0."""
    return scan_shards("TFRecord files", shards, _scan_tfrecord)


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
