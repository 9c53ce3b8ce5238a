"""One encoded image: modes, sizes, orientation, and what makes it bad."""

import io
import resource
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pdfast.data import pictures
from pdfast.data.pictures import BadImage, decode
from tests.data.files import encoded, solid


def one(folder: Path, channels: int = 3, size: int = 4) -> np.ndarray:
    """The only image of a folder."""
    (file,) = folder.iterdir()
    image = decode(file.read_bytes(), size, channels)
    assert image.shape == (size, size, channels) and image.dtype == np.uint8
    return image


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def fitted(image: Image.Image, size: int) -> np.ndarray:
    """[size, size] of a grey image, [size, size, 3] of one in colour."""
    channels = 1 if image.mode == "L" else 3
    return decode(png(image), size, channels).squeeze()


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
    ],
)
def test_modes_become_rgb_on_white(tmp_path, mode, colour, expected):
    solid(tmp_path / "a.png", colour, mode)
    assert one(tmp_path).tolist() == [[list(expected)] * 4] * 4
    assert one(tmp_path, channels=1).tolist() == [[[expected[0]]] * 4] * 4 or mode == "RGBA"


def test_colour_becomes_luma(tmp_path):
    solid(tmp_path / "a.png", (200, 100, 50))
    assert one(tmp_path, channels=1)[0, 0, 0] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)


@pytest.mark.parametrize("transparency", [None, 1, bytes((255, 0))])
def test_palettes(tmp_path, transparency):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 250, 0, 0])
    image.paste(1, (2, 0, 4, 4))
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    right = [250, 0, 0] if transparency is None else [255, 255, 255]
    assert one(tmp_path).tolist() == [[[10, 20, 30]] * 2 + [right] * 2] * 4


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = one(tmp_path, size=8)
    assert (image[:, 5:] > 250).all() and (image[:, :3] < 5).all()


def test_smaller_is_antialiased_bicubic():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (14, 7))
    inner = fitted(Image.fromarray(stripes), 8).astype(int)[:, 1:-1]
    assert np.abs(inner - 127.5).max() < 64  # picking pixels would leave 0 and 255
    ramp = np.tile(np.arange(0, 240, 20, dtype=np.uint8), (12, 1))
    expected = (np.arange(8) + 0.5) * 1.5 * 20 - 10
    assert np.abs(fitted(Image.fromarray(ramp), 8)[:, 2:-2] - expected[2:-2]).max() <= 2
    noise = np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)
    far = fitted(Image.fromarray(noise), 8).astype(int) - noise.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert np.abs(far).mean() < 5  # of 74, the deviation of the pixels: a sharper mean of blocks


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_of_a_long_image(turned):
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 200
    assert (fitted(Image.fromarray(pixels.T.copy() if turned else pixels), 8) == 200).all()


@pytest.mark.parametrize("size", [(3, 3), (3, 5), (13, 9), (8, 100), (31, 17), (15, 16), (2, 2)])
def test_any_size_becomes_the_wanted_one(size):
    image = fitted(Image.new("RGB", size, (9, 8, 7)), 8)
    assert image.shape == (8, 8, 3) and (image == (9, 8, 7)).all()


def animated() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("L", (4, 4), grey) for grey in (60, 180)]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()


def cmyk() -> bytes:
    content = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(content, "JPEG")
    return content.getvalue()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (animated(), "animated, 2 frames"),
        (cmyk(), "mode CMYK, not 8 bits"),
        (png(Image.new("I;16", (4, 4))), "mode I;16, not 8 bits"),
        (png(Image.new("RGB", (1, 9))), "1 x 9 pixels"),
    ],
)
def test_what_is_bad(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode(content, 8, 3)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_half_of_a_file_is_bad(suffix):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(content, suffix)
    with pytest.raises(BadImage):
        decode(content.getvalue()[: len(content.getvalue()) // 2], 8, 3)


def photograph_of_a_phone() -> bytes:
    """A JPEG with a second picture behind it, as phones write for depth or for a brighter one."""
    content = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in (60, 180)]
    frames[0].save(content, "MPO", save_all=True, append_images=frames[1:])
    return content.getvalue()


def test_of_a_still_with_more_behind_it_the_first_is_taken():
    assert (decode(photograph_of_a_phone(), 8, 3) == 60).all()


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "JPEG2000", "TGA", "PCX", "SGI"])
def test_no_other_formats_are_opened_whatever_their_name(kind):
    content = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content, kind)
    with pytest.raises(BadImage, match="not an image"):
        decode(content.getvalue(), 8, 3)


def test_nothing_is_started_for_postscript(monkeypatch):
    def started(*_args, **_kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(BadImage, match="not an image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", 8, 3)


@pytest.mark.parametrize("width, height", [(2, 65535), (65535, 2), (4, 4000)])
def test_a_strip_is_resized_where_it_is_cropped_alone(width, height):
    """The whole of it at that size would take up to 134 million pixels."""
    values = np.random.default_rng(0).integers(64, 192, (height, width), dtype=np.uint8)  # nothing is clipped
    content, size = encoded(values), 64
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = decode(content, size, 1)[..., 0].astype(int)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    # Of the middle of the strip, with what the interpolation sees around it.
    short, long = min(width, height), max(width, height)
    reach = short + 8
    first = (long - reach) // 2
    middle = values[first : first + reach] if height > width else values[:, first : first + reach]
    scale = size / short
    to = (round(middle.shape[1] * scale), round(middle.shape[0] * scale))
    whole = np.asarray(Image.fromarray(middle).resize(to, Image.Resampling.BICUBIC), dtype=int)
    at = round(long * scale - size) // 2 - round(first * scale)
    there = whole[at : at + size] if height > width else whole[:, at : at + size]
    assert np.abs(there - image).max() <= 2


@pytest.mark.parametrize("width, height", [(90, 31), (31, 90), (64, 64), (200, 50), (17, 101)])
def test_ordinary_images_are_resized_whole_and_then_cropped(width, height):
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = 16 / min(width, height)
    to = max(round(width * scale), 16), max(round(height * scale), 16)
    whole = np.asarray(Image.fromarray(values).resize(to, Image.Resampling.BICUBIC))
    left, upper = (to[0] - 16) // 2, (to[1] - 16) // 2
    assert np.array_equal(decode(encoded(values), 16, 3), whole[upper : upper + 16, left : left + 16])


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 99)
    bomb = png(Image.new("L", (10, 10)))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(BadImage, match="10 x 10 pixels, more than 99"):
        decode(bomb, 8, 1)


def test_only_pillows_own_warnings_are_left_out(monkeypatch):
    """Images are opened in threads: what others warn of meanwhile is not lost."""
    image = png(Image.new("RGB", (4, 4)))
    really = Image.open

    def opened(file, formats):
        warnings.warn("of something else", stacklevel=1)
        warnings.warn_explicit("a bomb", Image.DecompressionBombWarning, "Image.py", 1, module="PIL.Image")
        return really(file, formats=formats)

    monkeypatch.setattr(pictures.Image, "open", opened)
    with pytest.warns(UserWarning, match="of something else") as seen:
        pictures.examine(image)
    assert len(seen) == 1
