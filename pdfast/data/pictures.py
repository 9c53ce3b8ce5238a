"""One encoded image: what is taken of it, and what makes it bad."""

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile
from PIL.Image import Transpose

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # of Pillow: others of its readers start programs, such as Ghostscript
MOST_PIXELS = 1 << 26  # of an image as it is stored; more is taken for a decompression bomb
GREY, COLOUR, TRANSPARENT = {"1", "L"}, {"P", "RGB"}, {"LA", "PA", "RGBA"}
ORIENTATION, UPRIGHT = 0x0112, 1  # of EXIF
STILL = "MPO"  # a JPEG with more pictures behind it, as phones write: the first is the photograph
LONG = 8  # sides from which on the crop alone is resized: 2 x 65535 pixels would become gigabytes
OF_PILLOW = re.compile(r"PIL\.")
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What turns an image of each orientation upright."""
EXCHANGED = {5, 6, 7, 8}  # the orientations that exchange height and width


class BadImage(ValueError):
    """An encoded image that cannot be used, and why, in a few words."""


@dataclass(frozen=True)
class Opened:
    """An image whose header was read, with its size as it is seen."""

    image: Image.Image
    width: int
    height: int
    orientation: int
    """1 to 8, of EXIF or else of XMP; 1 where these say nothing, or nonsense."""

    @property
    def transparent(self) -> bool:
        return self.image.mode in TRANSPARENT or "transparency" in self.image.info


def _quiet_pillow() -> None:
    """Leave out Pillow's own warnings, of bombs, for one: the limit is ours. By a filter that stays: images are decoded in
    threads, where `catch_warnings` would take other warnings with it."""
    if not any(entry[3] == OF_PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=OF_PILLOW.pattern)


def examine(content: bytes) -> Opened:
    """Read the header, and all of a PNG, whose orientation may stand at its end. BadImage for what is no single image of 8
    bits, grey or in colour, of more than one pixel a side."""
    if not content:
        raise BadImage("empty")
    try:
        _quiet_pillow()
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_header(image)
        frames = 1 if image.format == STILL else getattr(image, "n_frames", 1)
        if frames > 1:
            raise BadImage(f"animated, {frames} frames")
        said = image.getexif().get(ORIENTATION)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # Pillow's decoders raise what they please for damaged data
        raise BadImage(_reason(error)) from None
    orientation = next((number for number in TURNS if number == said), UPRIGHT)
    width, height = image.size[::-1] if orientation in EXCHANGED else image.size
    return Opened(image, width, height, orientation)


def _check_header(image: ImageFile.ImageFile) -> None:
    """Raise a BadImage for what is not to be decoded, before anything is."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MOST_PIXELS}")
    if min(width, height) < 2:
        raise BadImage(f"{width} x {height} pixels")
    if image.mode not in GREY | COLOUR | TRANSPARENT:
        raise BadImage(f"mode {image.mode}, not 8 bits grey or in colour")
    if image.format == "PNG" and any(";16" in str(tile.args) for tile in image.tile):
        raise BadImage("16 bits a channel, not 8")  # of which Pillow would leave out the lower half


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def in_full(opened: Opened, channels: int) -> Image.Image:
    """Return the whole image, upright, on white where it is transparent, grey (channels 1) or in colour (3). BadImage where
    it cannot be decoded."""
    try:
        image = opened.image
        if opened.orientation != UPRIGHT:
            image = image.transpose(TURNS[opened.orientation])
        if opened.transparent:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:
        raise BadImage(_reason(error)) from None


Size = int | tuple[int, int]
"""Height and width in pixels, or one number for both."""


def sides(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Fit:
    """How an image gets its size: brought to `width` x `height`, of which the crop at (left, upper) is taken."""

    width: int
    height: int
    left: int
    upper: int


def fit(width: int, height: int, size: Size) -> Fit:
    """Return the centre of that size of an image which is brought to the least size that covers it."""
    tall, wide = sides(size)
    scale = max(wide / width, tall / height)
    width, height = max(round(width * scale), wide), max(round(height * scale), tall)
    return Fit(width, height, (width - wide) // 2, (height - tall) // 2)


def decode(content: bytes, size: Size, channels: int) -> np.ndarray:
    """Return the centre of an encoded image, uint8 [H, W, channels]; it is brought to the least size that covers H x W by bicubic
    interpolation, antialiased where that is smaller. BadImage where it cannot be used."""
    opened = examine(content)
    image, to = in_full(opened, channels), fit(opened.width, opened.height, size)
    tall, wide = sides(size)
    if to.width > LONG * wide or to.height > LONG * tall:
        x, y = image.width / to.width, image.height / to.height
        box = (x * to.left, y * to.upper, x * (to.left + wide), y * (to.upper + tall))
        image = image.resize((wide, tall), Image.Resampling.BICUBIC, box)
    else:  # the same but for rounding, and what it always was
        if image.size != (to.width, to.height):
            image = image.resize((to.width, to.height), Image.Resampling.BICUBIC)
        image = image.crop((to.left, to.upper, to.left + wide, to.upper + tall))
    return np.asarray(image).reshape(tall, wide, channels)
