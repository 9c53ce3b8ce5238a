"""A folder of image files, read once into memory at the network's size."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pdfast.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def load_image_folder(folder: Path, image_size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 images [N, image_size, image_size, channels] and labels, int64 [N] or None, of the image files in `folder`.

    Where the files lie in subfolders these are the classes, numbered in the order of their names; deeper folders and
    hidden files are passed over. channels is 1 or 3. UsageError, in one line that names the file, for what cannot be
    read.
    """
    if channels not in (1, 3):
        raise UsageError(f"image files have 1 or 3 channels, the network takes {channels}: make {folder} an .npz")
    try:
        top = _image_files(folder)
        subfolders = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
        classes = [files for child in subfolders if (files := _image_files(child))]
    except OSError as error:
        raise UsageError(f"cannot read {error.filename} ({error.strerror}): allow it, or give another folder") from None
    if top and classes:
        raise UsageError(f"{folder} has images both at its top and in subfolders: put all into class folders, or none")
    if not top and not classes:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{folder} holds no image files, directly or one folder down: give one that does ({suffixes})")
    files = top or [file for members in classes for file in members]
    images = np.empty((len(files), image_size, image_size, channels), dtype=np.uint8)
    for row, file in zip(images, files):
        row[:] = np.asarray(fit(_read(file, channels), image_size)).reshape(row.shape)
    return images, np.repeat(np.arange(len(classes)), [len(members) for members in classes]) if classes else None


def _image_files(folder: Path) -> list[Path]:
    # macOS leaves a hidden ._NAME.png beside NAME.png on foreign disks, which is no image.
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file())


def _read(file: Path, channels: int) -> "Image":
    """The (first) image of a file, upright, on white where it is transparent, in mode L or RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                # 16-bit grey, which Pillow would clip instead of scale.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow's decoders raise what they please for damaged files
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise UsageError(f"cannot read the image {file} ({reason}): remove it or make it again") from None


def fit(image: "Image", size: int) -> "Image":
    """The centre size x size of an image whose short side was brought to `size`.

    As for ImageNet 64x64 (Dhariwal & Nichol 2021): halved by a box filter while at least twice too large, then bicubic.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, upper = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, upper, left + size, upper + size))
