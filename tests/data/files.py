"""Small image files, indices of tar shards and TFRecord files to read."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def solid(path: Path, colour: object, mode: str = "RGB", size: tuple[int, int] = (4, 4), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray, *chunks: bytes, colour_type: int = 2) -> bytes:
    """A PNG file by the specification, of uint8 or big-endian uint16 [H, W, C], with more chunks after its header."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour_type, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def segment(marker: int, content: bytes) -> bytes:
    """Of a JPEG file."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def write_index(shard: Path, version: str = "v1.2") -> None:
    """As DALI's wds2idx writes it: the extension, offset, size and, from v1.2 on, name of each member, a sample a line."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, extension = member.name.partition(".")
            fields = samples.setdefault(stem, [])
            name = f" {member.name}" if version == "v1.2" else ""
            fields.append(f"{extension} {member.offset_data} {member.size}{name}")
    lines = [f"{version} {len(samples)}", *(" ".join(fields) for fields in samples.values())]
    shard.with_suffix(".idx").write_text("\n".join(lines) + "\n")


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def field(number: int, content: bytes) -> bytes:
    """Of a protocol buffer's message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _masked_crc32c(content: bytes) -> int:
    """By its definition: CRC-32C bit by bit, rotated by 15 bits, and a constant added."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def length_of_record(length: int) -> bytes:
    """How a record of a TFRecord file begins."""
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", _masked_crc32c(packed))


def record_of(message: bytes) -> bytes:
    """A record of a TFRecord file, but that the checksum of its content is left 0, which takes too long."""
    return length_of_record(len(message)) + message + bytes(4)


def write_tfrecord(path: Path, records: list[tuple[bytes, int | None]], *, packed: bool = True) -> None:
    """tf.train.Example messages with `image/encoded` and `image/class/label`, by the wire format."""
    with open(path, "wb") as file:
        for image, label in records:
            features = {"image/encoded": field(1, field(1, image)), "image/format": field(1, field(1, b"png"))}
            if label is not None:
                numbers = field(1, _varint(label)) if packed else _varint(1 << 3) + _varint(label)
                features["image/class/label"] = field(3, numbers)
            entries = b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in features.items())
            file.write(record_of(field(1, entries)))
