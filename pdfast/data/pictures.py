"""One encoded image: what is taken of it, and what makes it bad."""

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
MOST_PIXELS = 1 << 26  # of an image as it is stored; more is taken for a decompression bomb
GREY, COLOUR, TRANSPARENT = {"1", "L"}, {"P", "RGB"}, {"LA", "PA", "RGBA"}
ORIENTATION, UPRIGHT = 0x0112, 1  # of EXIF
OF_PILLOW = re.compile(r"PIL\.")
TURNED = {5, 6, 7, 8}  # the orientations that exchange height and width


class BadImage(ValueError):
    """An encoded image that cannot be used, and why, in a few words."""


@dataclass(frozen=True)
class Opened:
    """An image whose header was read, with its size as it is seen."""

    image: Image.Image
    width: int
    height: int
    orientation: int
    """Of EXIF, 1 to 8."""

    @property
    def transparent(self) -> bool:
        return self.image.mode in TRANSPARENT or "transparency" in self.image.info


def _quiet_pillow() -> None:
    """Leave out Pillow's own warnings, of bombs, for one: the limit is ours. By a filter that stays: images are decoded in
    threads, where `catch_warnings` would take other warnings with it."""
    if not any(entry[3] == OF_PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=OF_PILLOW.pattern)


def examine(content: bytes) -> Opened:
    """Read the header. BadImage for what is no single image of 8 bits, grey or in colour, of more than one pixel a side."""
    if not content:
        raise BadImage("empty")
    try:
        _quiet_pillow()
        image = Image.open(io.BytesIO(content))
        frames = getattr(image, "n_frames", 1)
        orientation = image.getexif().get(ORIENTATION, UPRIGHT)
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # Pillow's decoders raise what they please for damaged data
        raise BadImage(_reason(error)) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MOST_PIXELS}")
    if min(width, height) < 2:
        raise BadImage(f"{width} x {height} pixels")
    if frames > 1:
        raise BadImage(f"animated, {frames} frames")
    if image.mode not in GREY | COLOUR | TRANSPARENT:
        raise BadImage(f"mode {image.mode}, not 8 bits grey or in colour")
    width, height = (height, width) if orientation in TURNED else (width, height)
    return Opened(image, width, height, orientation)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def in_full(opened: Opened, channels: int) -> Image.Image:
    """The whole image, upright, on white where it is transparent, grey (channels 1) or in colour (3). BadImage where it
    cannot be decoded."""
    try:
        image = ImageOps.exif_transpose(opened.image)
        if opened.transparent:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:
        raise BadImage(_reason(error)) from None


@dataclass(frozen=True)
class Fit:
    """How an image becomes a square: brought to `width` x `height`, of which the crop at (left, upper) is taken."""

    width: int
    height: int
    left: int
    upper: int


def fit(width: int, height: int, size: int) -> Fit:
    """The centre `size` x `size` of an image whose short side is brought to `size`."""
    scale = size / min(width, height)
    width, height = max(round(width * scale), size), max(round(height * scale), size)
    return Fit(width, height, (width - size) // 2, (height - size) // 2)


def decode(content: bytes, size: int, channels: int) -> np.ndarray:
    """The centre of an encoded image, uint8 [size, size, channels]; its short side is brought to `size` by bicubic
    interpolation, antialiased where that is smaller. BadImage where it cannot be used."""
    opened = examine(content)
    image, to = in_full(opened, channels), fit(opened.width, opened.height, size)
    if image.size != (to.width, to.height):
        image = image.resize((to.width, to.height), Image.Resampling.BICUBIC)
    image = image.crop((to.left, to.upper, to.left + size, to.upper + size))
    return np.asarray(image).reshape(size, size, channels)
