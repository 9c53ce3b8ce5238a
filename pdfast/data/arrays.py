"""Images in .npy and .npz files."""

import io
import math
import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np

from pdfast.data.source import LARGEST_LABEL, NUMBERED
from pdfast.io.errors import UsageError

HEADER = 1 << 14  # bytes from the start that hold an array's header; NumPy takes no longer ones either
SHOWN, LONGEST_NAME = 8, 40  # arrays that a message lists, and characters of their names
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_array_file(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return uint8 images [N, H, W, C] and int64 labels [N] (None where there are none) of a .npy or .npz file.

    A .npz holds `images` and optionally `labels`, or a single array of images under any name; what seem to be labels of another name are
    not read, with a warning. UsageError, in one line
    that names the path, for anything else. Nothing is unpickled, and nothing is read before its header is known to fit.
    """
    try:
        with open(path, "rb") as file:  # given the path, NumPy leaves a damaged file open
            if file.read(2) == b"PK":
                images, labels = _of_archive(file, path)
            else:
                images, labels = _of_array(file, path), None
    except UsageError:
        raise
    except Exception as error:  # a damaged header or archive makes NumPy raise almost anything
        # NumPy's own text advises to load pickles, and says so of any file that it doesn't know.
        reason = "no NumPy data, or Python objects" if "pickle" in str(error) else " ".join(str(error).split())
        raise UsageError(
            f"cannot read {path} ({reason or type(error).__name__}): make it again with numpy.save or numpy.savez"
        ) from None
    images = np.ascontiguousarray(images if images.ndim == 4 else images[..., None])
    return images, None if labels is None else _checked_labels(labels, path)


def _of_array(file: IO[bytes], path: Path) -> np.ndarray:
    file.seek(0)
    shape, dtype = _header(file, os.fstat(file.fileno()).st_size, path)
    _check_images(shape, dtype, path)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _of_archive(file: IO[bytes], path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        names = loaded.files
        if "images" not in names and len(names) != 1:
            raise UsageError(
                f"{path} has no array `images`, but {_listed(loaded) or 'none at all'}: save the images under that name, and their "
                "labels, where there are some, as `labels`"
            )
        wanted = ["images" if "images" in names else names[0], *(name for name in ("labels",) if name in names)]
        headers = []
        for name in wanted:
            if f"{name}.npy" not in loaded.zip.namelist():
                raise UsageError(f"{path} is an archive of other files than arrays: make it with numpy.savez")
            with loaded.zip.open(f"{name}.npy") as member:
                headers.append(_header(member, loaded.zip.getinfo(f"{name}.npy").file_size, path))
        (shape, dtype), *of_labels = headers
        _check_images(shape, dtype, path)
        for labels_shape, labels_dtype in of_labels:
            if labels_shape != shape[:1]:
                raise UsageError(
                    f"{path} has labels of shape {labels_shape} for {shape[0]} images: give one label an image, as {shape[:1]}"
                )
            if not np.issubdtype(labels_dtype, np.integer):
                raise UsageError(f"{path} has labels of dtype {labels_dtype}: number the classes from 0, as integers")
        if not of_labels and (like_labels := [name for name in names if _is_of_labels(loaded, name, shape[0])]):
            warnings.warn(
                f"{path} has no array `labels`, but {_listed(loaded)}: if `{like_labels[0]}` has the labels, save it under that name",
                stacklevel=2,
            )
        arrays = [loaded[name] for name in wanted]
        return arrays[0], arrays[1] if len(arrays) > 1 else None


def _member(loaded: Any, name: str) -> tuple[tuple[int, ...], str] | None:
    """Shape and dtype of an array of an archive, None for another file."""
    try:
        with loaded.zip.open(f"{name}.npy") as member:
            start = io.BytesIO(member.read(HEADER))
        shape, _, dtype = READERS[np.lib.format.read_magic(start)](start)
    except Exception:  # what it is will be said if it is read
        return None
    return shape, str(dtype)


def _listed(loaded: Any) -> str:
    """Return the arrays of an archive, for people."""
    listed = []
    for name in sorted(loaded.files)[:SHOWN]:
        shape, dtype = _member(loaded, name) or ((), "no array")
        listed.append(
            f"`{name[:LONGEST_NAME]}` ({dtype} {list(shape)})" if shape else f"`{name[:LONGEST_NAME]}` ({dtype})"
        )
    return ", ".join(listed + ["..."] * (len(loaded.files) > SHOWN))


def _is_of_labels(loaded: Any, name: str, count: int) -> bool:
    found = _member(loaded, name)
    return found is not None and found[0] in ((count,), (count, 1)) and np.issubdtype(found[1], np.integer)


def _header(opened: IO[bytes], size: int, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array that takes `size` bytes in all. ValueError for what claims to be more than that, UsageError
    where the machine has not the memory."""
    start = io.BytesIO(opened.read(HEADER))
    if not start.getvalue().startswith(np.lib.format.MAGIC_PREFIX):
        raise ValueError("no NumPy data")
    version = np.lib.format.read_magic(start)
    if version not in READERS:
        raise ValueError(f"version {version} of NumPy's format")
    shape, _, dtype = READERS[version](start)
    if dtype.hasobject:
        raise ValueError("Python objects, which are not loaded")
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or nbytes > size:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} in {size} bytes")
    if nbytes > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise UsageError(
            f"{path} holds an array of {nbytes / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f}: give image files, tar "
            "shards or TFRecord instead, which are read as they are needed"
        )
    return shape, dtype


def _check_images(shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    if dtype != np.uint8:
        raise UsageError(f"{path} holds images of dtype {dtype}: convert them to uint8, 0 to 255")
    if len(shape) not in (3, 4):
        raise UsageError(f"{path} holds an array of shape {shape}: make it [N, H, W, C] or [N, H, W]")
    if 0 in shape:
        raise UsageError(f"{path} holds no images (shape {shape}): save some")


def _checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label <= LARGEST_LABEL:
            raise UsageError(f"{path} has the label {label}: {NUMBERED}")
    return labels.astype(np.int64)
