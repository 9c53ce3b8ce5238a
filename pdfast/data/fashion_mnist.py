"""Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf, 2017) out of its four IDX files."""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np

from pdfast.data.split import Split, check_split
from pdfast.io.errors import UsageError

MEAN = (0.2860,)
SOURCES = "install Debian's dataset-fashion-mnist and give /usr/share/datasets/fashion-mnist, or download it again"


def load_fashion_mnist(folder: Path) -> tuple[Split, Split]:
    """Return the 60000 training and 10000 test images, [N, 28, 28, 1], of a folder with the four files, gzipped or not.

    UsageError, in one line, where a file is missing or damaged, or they are another data set.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: {SOURCES}")
    train, test = read_part(folder, "train"), read_part(folder, "t10k")
    check_split(train, f"{folder} (training part)", per_class=6000, mean=MEAN)
    check_split(test, f"{folder} (test part)", per_class=1000)
    return train, test


def read_part(folder: Path, prefix: str) -> Split:
    """Return images [N, H, W, 1] and labels [N] of the two files that begin with `prefix`."""
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1)
    if len(images) != len(labels):
        raise UsageError(f"{folder} has {len(images)} {prefix} images and {len(labels)} labels: {SOURCES}")
    return Split(images[..., None], labels.astype(np.int64))


def _read_idx(folder: Path, name: str, ndim: int) -> np.ndarray:
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
    if file is None:
        raise UsageError(f"{folder} has no {name}.gz: {SOURCES}")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {file} ({error}): {SOURCES}") from None
    return parse_idx(content, ndim, file)


def parse_idx(content: bytes, ndim: int, where: str | Path) -> np.ndarray:
    """Return the uint8 array of `ndim` axes in an IDX file: 0, 0, type 8, ndim, big-endian uint32 sizes, data."""
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, 8, ndim)):
        raise UsageError(f"{where} is not an IDX file of bytes with {ndim} axes: {SOURCES}")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != prod(shape):
        raise UsageError(f"{where} has {len(content) - start} bytes for an array of shape {shape}: {SOURCES}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
