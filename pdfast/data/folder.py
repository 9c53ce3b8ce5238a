"""A folder of image files, read once into memory at the network's size."""

from pathlib import Path

import numpy as np

from pdfast.errors import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def load_image_folder(folder: Path, image_size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 images [N, image_size, image_size, channels] and labels, int64 [N] or None, of the image files in `folder`.

    Where the files lie in subfolders these are the classes, numbered in the order of their names. UsageError, naming the
    file, for what can't be read.
    """
    top = _image_files(folder)
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and _image_files(child))
    if top and classes:
        raise UsageError(f"{folder} has images both at its top and in subfolders: put all into class folders, or none")
    if not top and not classes:
        raise UsageError(f"{folder} holds no image files ({', '.join(sorted(SUFFIXES))})")
    labelled = [(file, label) for label, child in enumerate(classes) for file in _image_files(child)] or [(f, 0) for f in top]
    images = np.stack([_read(file, image_size, channels) for file, _ in labelled])
    return images, np.array([label for _, label in labelled], dtype=np.int64) if classes else None


def _image_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    """Shrink by halving with a box filter while twice too large, then bicubic to the short side, then crop the centre."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            image.load()
            if image.mode in ("LA", "PA") or "transparency" in image.info or image.mode == "RGBA":
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = image.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read the image {file}: {error}; remove it or make it again") from None
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        wanted = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(wanted, Image.Resampling.BICUBIC)
    left, upper = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, upper, left + size, upper + size))).reshape(size, size, channels)
