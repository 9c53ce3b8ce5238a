"""Sample grids: pictures of small images, enlarged without smoothing."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

BACKGROUND = 255
LABEL_WIDTH = 84


def image_grid(images: np.ndarray, columns: int, scale: int = 1, gap: int = 1) -> np.ndarray:
    """Return images uint8 [n, H, W, C] side by side, row by row: uint8 [H', W', 3]. Each pixel becomes scale x scale."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    pixels = images.repeat(scale, 1).repeat(scale, 2)
    if channels == 1:
        pixels = pixels.repeat(3, 3)
    step_y, step_x = height * scale + gap, width * scale + gap
    grid = np.full((rows * step_y - gap, columns * step_x - gap, 3), BACKGROUND, np.uint8)
    for i, image in enumerate(pixels):
        y, x = i // columns * step_y, i % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image
    return grid


def steps_grid(rows: list[tuple[str, np.ndarray]], scale: int) -> np.ndarray:
    """Return one labelled row of images for each (label, uint8 [k, H, W, C]), columns aligned: uint8 [H', W', 3]."""
    from PIL import Image, ImageDraw, ImageFont

    gap = 4
    strips = [image_grid(images, columns=len(images), scale=scale, gap=gap) for _, images in rows]
    height = sum(strip.shape[0] + gap for strip in strips) - gap
    width = LABEL_WIDTH + max(strip.shape[1] for strip in strips)
    canvas = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    y = 0
    for (label, _), strip in zip(rows, strips, strict=True):
        middle = y + strip.shape[0] / 2
        pen.text((LABEL_WIDTH - 10, middle), label, fill=(40, 40, 40), font=font, anchor="rm")
        canvas.paste(Image.fromarray(strip), (LABEL_WIDTH, y))
        y += strip.shape[0] + gap
    return np.asarray(canvas)


def write_png(file: Path | BinaryIO, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG."""
    from PIL import Image

    Image.fromarray(pixels).save(file, format="PNG")
