"""Folders of image files: modes, sizes, classes, and what each bad folder is told."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdfast.data import load_source
from pdfast.data.folder import fit, load_image_folder
from tests.data.errors import refusal


def solid(path: Path, colour: object, mode: str = "RGB", size: tuple[int, int] = (4, 4), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def one(folder: Path, channels: int = 3, size: int = 4) -> np.ndarray:
    """The only image of a folder."""
    images, labels = load_image_folder(folder, size, channels)
    assert images.shape == (1, size, size, channels) and images.dtype == np.uint8 and labels is None
    return images[0]


def test_every_format_in_the_order_of_the_names(tmp_path):
    for i, name in enumerate(["a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp", "f.gif"]):
        lossless = {"lossless": True} if name.endswith("webp") else {}
        solid(tmp_path / name, (40 * i, 40 * i, 40 * i), **lossless)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_text("what macOS leaves behind")
    images, labels = load_image_folder(tmp_path, 4, 3)
    assert labels is None
    assert np.abs(images.astype(int) - 40 * np.arange(6)[:, None, None, None]).max() <= 1


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for path, grey in {"dog/2.png": 4, "dog/1.png": 3, "cat/1.png": 1, "cat/2.png": 2, "emu/1.png": 5}.items():
        solid(tmp_path / path, grey, "L")
    (tmp_path / "boa").mkdir()
    solid(tmp_path / ".hidden" / "1.png", 9, "L")
    source = load_source(str(tmp_path), image_size=4, channels=1)
    every = source.take(torch.arange(5))
    assert every.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert every.labels.tolist() == [0, 0, 1, 1, 2] and every.labels.dtype == torch.int64
    assert (source.name, source.num_classes, source.shape) == (tmp_path.name, 3, (4, 4, 1))


def test_a_relative_folder_has_a_name(tmp_path, monkeypatch):
    solid(tmp_path / "a.png", 1, "L")
    monkeypatch.chdir(tmp_path)
    assert load_source(".", image_size=4, channels=1).name == tmp_path.name


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
        ("I;16", 0x7F20, (127, 127, 127)),
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


def test_cmyk_jpeg(tmp_path):
    solid(tmp_path / "a.jpg", (0, 255, 255, 0), "CMYK")
    assert np.abs(one(tmp_path).astype(int) - (255, 0, 0)).max() <= 3


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (4, 4), grey) for grey in (60, 180)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (one(tmp_path) == 60).all()


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = one(tmp_path, size=8)
    assert (image[:, 5:] > 250).all() and (image[:, :3] < 5).all()


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_halving_is_the_mean_of_blocks(factor):
    pixels = np.random.default_rng(1).integers(0, 256, (8 * factor, 8 * factor, 3), dtype=np.uint8)
    means = pixels.reshape(8, factor, 8, factor, 3).mean(axis=(1, 3))
    # Each halving rounds twice.
    assert np.abs(np.asarray(fit(Image.fromarray(pixels), 8)) - means).max() < factor


def test_bicubic_for_the_rest_is_antialiased():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (14, 7))
    inner = np.asarray(fit(Image.fromarray(stripes), 8)).astype(int)[:, 1:-1]
    assert np.abs(inner - 127.5).max() < 64  # picking pixels would leave 0 and 255
    ramp = np.tile(np.arange(0, 240, 20, dtype=np.uint8), (12, 1))
    expected = (np.arange(8) + 0.5) * 1.5 * 20 - 10
    assert np.abs(np.asarray(fit(Image.fromarray(ramp), 8))[:, 2:-2] - expected[2:-2]).max() <= 2


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_of_a_long_image(turned):
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 200
    image = fit(Image.fromarray(pixels.T.copy() if turned else pixels), 8)
    assert image.size == (8, 8) and (np.asarray(image) == 200).all()


@pytest.mark.parametrize("size", [(3, 3), (3, 5), (13, 9), (8, 100), (31, 17), (15, 16)])
def test_any_size_becomes_the_wanted_one(size):
    image = fit(Image.new("RGB", size, (9, 8, 7)), 8)
    assert image.size == (8, 8) and (np.asarray(image) == (9, 8, 7)).all()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    solid(tmp_path / "train" / "cat" / "1.png", 1, "L")
    message = refusal(load_image_folder, tmp_path, 4, 3, names=tmp_path)
    assert "holds no image files, directly or one folder down" in message and ".png" in message


def test_a_mixed_folder_is_refused(tmp_path):
    solid(tmp_path / "1.png", 1, "L")
    solid(tmp_path / "cat" / "1.png", 1, "L")
    message = refusal(load_image_folder, tmp_path, 4, 3, names=tmp_path)
    assert "both at its top and in subfolders" in message and "put all into class folders, or none" in message


def test_a_corrupt_image_is_named(tmp_path):
    solid(tmp_path / "a" / "1.png", 1, "L")
    (tmp_path / "a" / "2.png").write_text("<html>404</html>")
    message = refusal(load_image_folder, tmp_path, 4, 3, names=tmp_path / "a" / "2.png")
    assert "(not an image): remove it or make it again" in message


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "remove it or make it again" in refusal(load_image_folder, tmp_path, 4, 3, names=path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    listing = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    message = refusal(load_image_folder, tmp_path, 4, 3, names=tmp_path / "secret")
    assert "(Permission denied): allow it, or give another folder" in message


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused(tmp_path, channels):
    solid(tmp_path / "1.png", 1, "L")
    assert f"the network takes {channels}" in refusal(load_image_folder, tmp_path, 4, channels, names=tmp_path)
