"""Images in .npy and .npz files."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from pdfast.errors import UsageError


def load_array_file(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 images [N, H, W, C] and int64 labels [N] (None where there are none) of a .npy or .npz file.

    A .npz holds `images` and optionally `labels`, or one unnamed array of images. UsageError for anything else.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            images, labels = loaded, None
        else:
            with loaded:
                names = loaded.files
                if "images" not in names and len(names) != 1:
                    raise UsageError(f"{path} has no array `images` (it has {', '.join(names) or 'none'}): save one under that name")
                images = loaded["images" if "images" in names else names[0]]
                labels = loaded["labels"] if "labels" in names else None
    except FileNotFoundError:
        raise UsageError(f"there are no data at {path}") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"cannot read {path}: {error}; make it again with numpy.save or numpy.savez") from None
    return _checked_images(images, path), _checked_labels(labels, len(images), path)


def _checked_images(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype != np.uint8:
        raise UsageError(f"{path} holds images of dtype {images.dtype}: convert them to uint8, 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UsageError(f"{path} holds an array of shape {images.shape}: images are [N, H, W, C] or [N, H, W]")
    if len(images) == 0:
        raise UsageError(f"{path} holds no images")
    return np.ascontiguousarray(images)


def _checked_labels(labels: np.ndarray | None, count: int, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,):
        raise UsageError(f"{path} has labels of shape {labels.shape} for {count} images: give one label an image")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UsageError(f"{path} has labels that are not whole numbers from 0 up (dtype {labels.dtype}): number the classes from 0")
    return labels.astype(np.int64)
