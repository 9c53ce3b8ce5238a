"""Every loader makes the same pixels of the same bytes: orientations, depths, colour spaces and metadata that decoders know
differently."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from pdfast.data import dali, load_source
from pdfast.data.files import Samples
from pdfast.data.formats import find_images
from tests.data.files import chunk, encoded, png, segment

H, W, SIZE = 24, 40, 16
ROWS, COLUMNS = np.mgrid[:H, :W]
PIXELS = np.stack([COLUMNS * 6, ROWS * 10, 255 - 3 * (ROWS + COLUMNS)], axis=-1).clip(0, 255).astype(np.uint8)
GARISH = np.kron(np.random.default_rng(0).integers(0, 2, (6, 10, 3)), np.ones((4, 4, 1))) * 200 + 25
JPEG = encoded(PIXELS, "JPEG", quality=95)
BYTE_SIX, SHORT_SIX, SHORT_THREE, SHORT_NINE = (
    b"II*\0\x08\0\0\0\x01\0\x12\x01" + bytes([kind, 0, 1, 0, 0, 0, value]) + bytes(7)
    for kind, value in ((1, 6), (3, 6), (3, 3), (3, 9))
)


def xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    )


def with_segments(*contents: bytes) -> bytes:
    """The JPEG with these at its start."""
    return JPEG[:2] + b"".join(segment(0xE1, content) for content in contents) + JPEG[2:]


def of_exif(content: bytes) -> bytes:
    return with_segments(b"Exif\0\0" + content)


def mpo() -> bytes:
    content = io.BytesIO()
    others = [Image.fromarray(PIXELS[::-1])]
    Image.fromarray(PIXELS).save(content, "MPO", save_all=True, append_images=others, quality=95)
    return content.getvalue()


UPRIGHT = Image.open(io.BytesIO(JPEG)).convert("RGB")
TURNED = UPRIGHT.transpose(Image.Transpose.ROTATE_270)
HALF = UPRIGHT.transpose(Image.Transpose.ROTATE_180)
EXACT = Image.fromarray(PIXELS)
OF_GARISH = encoded(GARISH.astype(np.uint8), "JPEG", quality=90)
ALL_TURNS = {
    number: Image.open(io.BytesIO(JPEG)).transpose(turn)
    for number, turn in enumerate(
        ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), 2
    )
    for turn in (Image.Transpose[turn],)
}

# The bytes, and the image that they are.
CASES = {
    "JPEG": (JPEG, UPRIGHT),
    **{
        f"EXIF {number}": (of_exif(SHORT_SIX.replace(b"\x06", bytes([number]))), image)
        for number, image in ALL_TURNS.items()
    },
    "EXIF 9": (of_exif(SHORT_NINE), UPRIGHT),
    "EXIF, a byte": (of_exif(BYTE_SIX), UPRIGHT),
    "XMP 6": (with_segments(b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)), TURNED),
    "XMP 3": (with_segments(b"http://ns.adobe.com/xap/1.0/\0" + xmp(3)), HALF),
    "EXIF twice": (with_segments(b"Exif\0\0" + SHORT_SIX, b"Exif\0\0" + SHORT_SIX), TURNED),
    "MPO": (mpo(), Image.open(io.BytesIO(mpo())).convert("RGB")),
    "garish": (OF_GARISH, Image.open(io.BytesIO(OF_GARISH)).convert("RGB")),
    "grey JPEG": (encoded(PIXELS[..., 0], "JPEG", quality=95), Image.fromarray(PIXELS[..., 0])),
    "PNG": (encoded(PIXELS), EXACT),
    "PNG, sRGB": (png(PIXELS, chunk(b"sRGB", b"\0")), EXACT),
    "PNG, gamma": (png(PIXELS, chunk(b"gAMA", struct.pack(">I", 100000))), EXACT),
    "PNG, bits": (png(PIXELS, chunk(b"sBIT", b"\5\5\5")), EXACT),
    "PNG, EXIF 6": (png(PIXELS, chunk(b"eXIf", SHORT_SIX)), EXACT.transpose(Image.Transpose.ROTATE_270)),
    "WebP": (encoded(PIXELS, "WEBP", lossless=True), EXACT),
    "WebP, EXIF 6": (
        encoded(PIXELS, "WEBP", lossless=True, exif=SHORT_SIX),
        EXACT.transpose(Image.Transpose.ROTATE_270),
    ),
    "BMP of 16 bits a pixel": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54 + 2 * H * W, 0, 0, 54, 40, W, H, 1, 16, 0, 2 * H * W, 0, 0, 0, 0)
        + ((PIXELS[::-1] >> 3).astype("<u2") @ np.array([1024, 32, 1], dtype="<u2")).tobytes(),
        Image.fromarray(PIXELS >> 3 << 3 | PIXELS >> 5),
    ),
}  # fmt: skip
LOADERS = [
    "portable",
    "resident",
    pytest.param("dali", marks=pytest.mark.skipif(dali.missing() is not None, reason=str(dali.missing()))),
]


def expected(image: Image.Image, channels: int) -> torch.Tensor:
    """The centre square at SIZE, by Pillow alone."""
    width, height = image.size
    scale = SIZE / min(width, height)
    to = round(width * scale), round(height * scale)
    small = image.convert("L" if channels == 1 else "RGB").resize(to, Image.Resampling.BICUBIC)
    left, upper = (to[0] - SIZE) // 2, (to[1] - SIZE) // 2
    return torch.from_numpy(np.array(small.crop((left, upper, left + SIZE, upper + SIZE)))).view(SIZE, SIZE, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_makes_the_same_of_it(tmp_path, loader, channels):
    for i, (content, _) in enumerate(CASES.values()):
        (tmp_path / f"{i:02}.png").write_bytes(content)
    source = load_source(str(tmp_path), image_size=SIZE, channels=channels, loader=loader)
    # The portable and the DALI loader decode in `stream`; in order, as one batch, an epoch is a permutation.
    stream = source._loader.stream(iter([list(range(len(CASES)))])) if loader != "resident" else None
    images = next(iter(stream)).images if stream else source.take(torch.arange(len(CASES))).x
    worst = {
        name: int((image.int() - expected(truth, channels).int()).abs().max())
        for image, (name, (_, truth)) in zip(images, CASES.items(), strict=True)
    }
    assert not {name: difference for name, difference in worst.items() if difference > 8}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_bad(tmp_path, loader, colour_type, channels):
    pixels = np.full((8, 8, channels), 0x1234, dtype=">u2")
    (tmp_path / "a.png").write_bytes(png(pixels, colour_type=colour_type))
    (tmp_path / "b.png").write_bytes(encoded(PIXELS))
    source = load_source(str(tmp_path), image_size=8, channels=3, loader=loader, max_bad=1.0)
    next(source.stream(torch.arange(2), 2, 0, 0))
    (reason,) = source.bad.reasons.values()
    assert "16" in reason and "not 8" in reason


def test_an_image_that_dali_alone_cannot_decode_is_decoded_by_pillow(tmp_path):
    pytest.importorskip("nvidia.dali")
    (tmp_path / "a.jpg").write_bytes(JPEG)
    loader = dali.DaliLoader(Samples(find_images(tmp_path), SIZE, 3, 0), torch.device("cpu"), threads=1)
    really = loader._run

    def refusing(pipeline, items):
        if not all(item.decoded for item in items):
            raise RuntimeError("no")
        return really(pipeline, items)

    loader._run = refusing
    (batch,) = loader._batches(iter([[0, 0]]))
    assert batch.indices.tolist() == [0, 0] and not batch.bad
    assert (batch.images[1].int() - expected(UPRIGHT, 3).int()).abs().max() <= 8
