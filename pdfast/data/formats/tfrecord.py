"""TFRecord files of tf.train.Example, read without TensorFlow.

Of the two checksums of a record that of its length is verified, at 5 us a record; that of its content is not: in Python it
takes a second for 5 MB.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from pdfast.data.encoded import EncodedImages
from pdfast.data.formats.shards import scan_shards

TFRECORDS = "TFRecord files"
IMAGES, LABELS = ("image/encoded", "image"), ("image/class/label", "label")
VARINT, BYTES = 0, 2  # types of fields
LONGEST_VARINT = 10  # bytes, of a 64-bit number
BEFORE, BEHIND = (
    12,
    4,
)  # bytes of a record: its length and the checksum of that, then its content, then the checksum of that
BYTES_LIST, INT64_LIST = 1, 3  # fields of a Feature


def from_tfrecords(shards: list[Path]) -> EncodedImages:
    """Records of tf.train.Example with `image/encoded` or `image`, and, where there are classes, `image/class/label` or
    `label`, numbered from 0; a negative label, as TFDS writes it for none, several of them or a text are no label."""
    return scan_shards(TFRECORDS, shards, _scan)


def _scan(shard: Path, found: EncodedImages) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, number = 0, 0
        while at < len(data):
            start = at + BEFORE
            if start > len(data):
                raise ValueError("it ends early")
            length, checksum = struct.unpack("<QI", data[at:start])
            if masked_crc32c(data[at : at + 8]) != checksum:
                raise ValueError(f"the length of record {number} does not have its checksum")
            end = start + length
            if end + BEHIND > len(data):
                raise ValueError("it ends early")
            features = {name: values for name, *values in _features(data, start, end)}
            images = next((features[name] for name in IMAGES if name in features), [])
            label = next((features[name] for name in LABELS if name in features), [])
            if len(images) != 1 or not isinstance(images[0], tuple):
                several = f"{len(images)} images" if images else f"no `image/encoded`, but {sorted(features)}"
                raise ValueError(f"record {number} has {several}")
            only = label[0] if len(label) == 1 and isinstance(label[0], int) else -1
            found.add(f"{shard.name}/{number}", only, *images[0])
            at, number = end + BEHIND, number + 1


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(LONGEST_VARINT):
        if at + i >= end:
            break
        value |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return value, at + i + 1
    raise ValueError(f"there is no number at byte {at}")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, type, start and end of each field of a protocol buffer's message."""
    while at < end:
        key, start = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == BYTES:
            size, start = _varint(data, start, end)
            at = start + size
        elif kind == VARINT:
            _, at = _varint(data, start, end)
        else:
            raise ValueError(f"a field of type {kind}, which tf.train.Example has not")
        if at > end:
            raise ValueError(f"a field ends behind its message, at byte {at}")
        yield number, kind, start, at


def _messages(data: mmap.mmap, at: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Start and end of each field of that number that has bytes."""
    return ((a, b) for number, kind, a, b in _fields(data, at, end) if number == wanted and kind == BYTES)


def _features(data: mmap.mmap, start: int, end: int) -> Iterator[list]:
    """Of a tf.train.Example, the name of each feature, then the offset and size of each of its bytes, or its integers."""
    for features in _messages(data, start, end, 1):
        for entry in _messages(data, *features, 1):
            name = next((data[a:b].decode(errors="surrogateescape") for a, b in _messages(data, *entry, 1)), "")
            values: list[tuple[int, int] | int] = []
            for feature in _messages(data, *entry, 2):
                for number, _, a, b in _fields(data, *feature):
                    if number == BYTES_LIST:
                        values += [(c, d - c) for c, d in _messages(data, a, b, 1)]
                    elif number == INT64_LIST:
                        values += _integers(data, a, b)
            yield [name, *values]


def _integers(data: mmap.mmap, at: int, end: int) -> Iterator[int]:
    """Of an Int64List, packed or not."""
    for number, _, start, stop in _fields(data, at, end):
        while number == 1 and start < stop:
            value, start = _varint(data, start, stop)
            value &= (1 << 64) - 1
            yield value - (1 << 64) if value >> 63 else value
