"""Images in .npy and .npz files."""

from pathlib import Path

import numpy as np

from pdfast.errors import UsageError


def load_array_file(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 images [N, H, W, C] and int64 labels [N] (None where there are none) of a .npy or .npz file.

    A .npz holds `images` and optionally `labels`, or a single array of images under any name. UsageError, in one line
    that names the path, for anything else. Nothing is unpickled.
    """
    try:
        with open(path, "rb") as file:  # given the path, NumPy leaves a damaged file open
            loaded = np.load(file, allow_pickle=False)
            images, labels = (loaded, None) if isinstance(loaded, np.ndarray) else _members(loaded, path)
    except UsageError:
        raise
    except Exception as error:  # a damaged header or archive makes NumPy raise almost anything
        # NumPy's own text advises to load pickles, and says so of any file that it doesn't know.
        reason = "no NumPy data, or Python objects" if "pickle" in str(error) else " ".join(str(error).split())
        raise UsageError(
            f"cannot read {path} ({reason or type(error).__name__}): make it again with numpy.save or numpy.savez"
        ) from None
    images = _checked_images(images, path)
    return images, None if labels is None else _checked_labels(labels, len(images), path)


def _members(file: np.lib.npyio.NpzFile, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    names = file.files
    if "images" not in names and len(names) != 1:
        raise UsageError(f"{path} has no array `images` (it has {sorted(names)}): save one under that name")
    arrays = file["images" if "images" in names else names[0]], file["labels"] if "labels" in names else None
    for array in arrays:
        if isinstance(array, bytes):
            raise UsageError(f"{path} is an archive of other files than arrays: make it with numpy.savez")
    return arrays


def _checked_images(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype != np.uint8:
        raise UsageError(f"{path} holds images of dtype {images.dtype}: convert them to uint8, 0 to 255")
    if images.ndim not in (3, 4):
        raise UsageError(f"{path} holds an array of shape {images.shape}: make it [N, H, W, C] or [N, H, W]")
    if images.size == 0:
        raise UsageError(f"{path} holds no images (shape {images.shape}): save some")
    return np.ascontiguousarray(images if images.ndim == 4 else images[..., None])


def _checked_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    if labels.shape != (count,):
        raise UsageError(f"{path} has labels of shape {labels.shape} for {count} images: give one label an image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{path} has labels of dtype {labels.dtype}: number the classes from 0, as integers")
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise UsageError(f"{path} has the label {labels.min()}: number the classes from 0")
    return labels
