"""Writers of small archives in the published formats, independent of the readers, and whole ones of plain colours."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
PARTS = [*TRAIN, "test_batch"]


def pictures(part: int, count: int) -> tuple[np.ndarray, list[int]]:
    """Random images [count, 32, 32, 3] and labels of one file of CIFAR-10."""
    random = np.random.default_rng(part)
    return random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, count).tolist()


def official_record(image: np.ndarray, label: int) -> bytes:
    """The label, then the red, green and blue plane, each row by row."""
    planes = (bytes(int(image[y, x, c]) for y in range(32) for x in range(32)) for c in range(3))
    return bytes([label]) + b"".join(planes)


def official_members(count: int) -> dict[str, bytes]:
    members = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    for i, name in enumerate(PARTS):
        records = map(official_record, *pictures(i, count))
        members[f"cifar-10-batches-bin/{name}.bin"] = b"".join(records)
    return members


def sheet(images: np.ndarray) -> bytes:
    """A PNG whose row i has the pixels of image i, row by row."""
    picture = Image.new("RGB", (1024, len(images)))
    for i, image in enumerate(images):
        for place in range(1024):
            picture.putpixel((place, i), tuple(map(int, image[place // 32, place % 32])))
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def npm_members(count: int) -> dict[str, bytes]:
    members = {f"package/{name}.png": sheet(pictures(i, count)[0]) for i, name in enumerate(PARTS)}
    labels = [pictures(i, count)[1] for i in range(6)]
    members["package/train_lables.json"] = json.dumps(sum(labels[:5], [])).encode()
    members["package/test_lables.json"] = json.dumps(labels[5]).encode()
    return members


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, train: int, test: int, suffix: str = "", grey: int = 73) -> Path:
    """Images of one grey (73 / 255 is the true mean), their classes in turn."""
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", np.full((count, 28, 28), grey, dtype=np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))
    return folder
