"""Whatever bytes the readers of data are given, what they say is one line, and they take no more memory than is there."""

import io
import resource
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdfast.data.arrays import load_array_file
from pdfast.data.formats import find_images
from pdfast.data.pictures import BadImage, decode
from pdfast.io.errors import UsageError
from tests.data.archives import write_tar
from tests.data.errors import refusal
from tests.data.files import chunk, encoded, field, length_of_record, record_of, write_index, write_tfrecord

ANY = settings(derandomize=True, deadline=None, database=None, max_examples=120)
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)


def made(write: Callable[[Path], object], name: str, folder: Path) -> bytes:
    write(folder / name)
    return (folder / name).read_bytes()


def changed(*contents: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, or one of these contents with a few bytes exchanged, put in or left out, or cut short."""

    @st.composite
    def some(draw: st.DrawFn) -> bytes:
        content = bytearray(draw(st.sampled_from(contents)))
        for _ in range(draw(st.integers(0, 4))):
            at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 4))
            content[at : at + length] = draw(st.one_of(st.binary(max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))))
        return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)

    return st.one_of(some(), st.binary(max_size=200))


def said_in_one_line(call: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except (UsageError, BadImage) as error:
            assert "\n" not in str(error) and str(error)


def all_images(path: Path) -> None:
    found = find_images(path)
    for i in range(len(found)):
        try:
            decode(found.read(i), 4, 3)
        except BadImage as error:
            assert "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bytes")


def images() -> list[bytes]:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    kinds = [
        ("PNG", {}),
        ("JPEG", {"exif": exif}),
        ("WEBP", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("JPEG", {"progressive": True}),
    ]
    return [encoded(PIXELS[0], kind, **options) for kind, options in kinds]


@ANY
@given(content=changed(*images()))
def test_an_image(content):
    said_in_one_line(lambda: decode(content, 4, 3))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array(folder, suffix):
    def write(path: Path) -> None:
        np.save(path, PIXELS) if suffix == ".npy" else np.savez(path, images=PIXELS, labels=np.arange(4))

    content = made(write, f"a{suffix}", folder)

    @ANY
    @given(content=changed(content))
    def any_bytes(content):
        (folder / f"b{suffix}").write_bytes(content)
        said_in_one_line(lambda: load_array_file(folder / f"b{suffix}"))

    any_bytes()


def test_a_tar_and_its_index(folder):
    members = {f"{i}.{kind}": content for i in range(2) for kind, content in (("png", images()[0]), ("cls", b"1"))}
    contents = [made(lambda path: write_tar(path, members, "w"), "of_tar.tar", folder)]
    for i, layout in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(folder / f"{i}.tar", "w", format=layout) as tar:
            tar.addfile(tarfile.TarInfo("é" * 90 + ".png"), io.BytesIO())
        contents.append((folder / f"{i}.tar").read_bytes())
    write_index(folder / "of_tar.tar")
    index = (folder / "of_tar.idx").read_bytes()
    of_index, of_tar = folder / "index", folder / "tars"
    of_index.mkdir()
    of_tar.mkdir()
    (of_index / "a.tar").write_bytes(contents[0])

    @ANY
    @given(content=changed(*contents))
    def any_tar(content):
        (of_tar / "a.tar").write_bytes(content)
        said_in_one_line(lambda: all_images(of_tar))

    @ANY
    @given(content=changed(index))
    def any_index(content):
        (of_index / "a.idx").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find_images(of_index)
        # Whatever the index says, these are the images and their labels.
        assert [decode(found.read(i), 5, 3).tolist() for i in range(2)] == [decode(images()[0], 5, 3).tolist()] * 2
        assert found.labels.tolist() == [1, 1]

    any_tar()
    any_index()


def test_a_tfrecord(folder):
    of_records = folder / "records"
    of_records.mkdir()
    for packed in (True, False):
        write_tfrecord(folder / f"{packed}.tfrecord", [(images()[0], 1), (images()[1], 300)], packed=packed)
    contents = [(folder / f"{packed}.tfrecord").read_bytes() for packed in (True, False)]

    @ANY
    @given(content=changed(*contents))
    def any_bytes(content):
        (of_records / "a.tfrecord").write_bytes(content)
        said_in_one_line(lambda: all_images(of_records))

    any_bytes()


def test_a_list_of_labels(folder):
    of_labels = folder / "labels"
    of_labels.mkdir()
    for name in ("a", "é"):
        (of_labels / f"{name}.png").write_bytes(images()[0])
    text = 'name,label\na.png,3\n"é.png",1\n'

    @ANY
    @given(content=changed(*(text.encode(encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"))))
    def any_bytes(content):
        (of_labels / "labels.csv").write_bytes(content)
        said_in_one_line(lambda: all_images(of_labels))

    any_bytes()


def taken(call: Callable[[], object]) -> int:
    """By how many MiB a call raises the most that this process ever took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": shape})
    return content.getvalue()


@pytest.mark.parametrize("shape", [(1 << 40, 8, 8, 3), (1 << 62, 1 << 62, 1), (-1, 8, 8), (2, -8, -8), (4, 1 << 30, 0)])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_that_claims_more_than_there_is(tmp_path, shape, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        path.write_bytes(header(shape) + bytes(99))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", header(shape) + bytes(99))
    assert taken(lambda: refusal(load_array_file, path, names=path)) < 16


def test_bombs_in_an_archive(tmp_path):
    """200 MiB of zeros in 200 kB: behind a short header, within a header, and as labels of 4 images."""
    zeros = bytes(200 << 20)
    long_header = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(zeros)) + zeros[:100]
    bombs = {
        "labels.npy": {"images.npy": header((4, 5, 6)) + bytes(120), "labels.npy": header((25 << 20,), "<i8") + zeros},
        "images.npy": {"images.npy": header((25 << 20,), "<f8") + zeros},
        "header": {"images.npy": long_header + zeros},
    }
    for name, members in bombs.items():
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        assert path.stat().st_size < 2 << 20
    del zeros, bombs, members, content
    for path in tmp_path.iterdir():
        assert taken(lambda path=path: refusal(load_array_file, path, names=path)) < 16


def test_an_array_larger_than_the_machine_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", PIXELS)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 359}[name])
    message = refusal(load_array_file, tmp_path / "a.npy", names=tmp_path / "a.npy")
    assert "this machine has 0.0: give image files" in message


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, (1 << 63) - 16])
def test_lengths_in_shards_that_are_longer_than_these(tmp_path, length):
    (tmp_path / "a.tfrecord").write_bytes(length_of_record(length) + bytes(99))
    assert "it ends early" in refusal(find_images, tmp_path / "a.tfrecord", names="a.tfrecord")
    inner = field(1, field(1, field(1, b"image"))[:-6] + b"\xff" * 8 + b"\x01")
    (tmp_path / "b.tfrecord").write_bytes(record_of(inner))
    refusal(find_images, tmp_path / "b.tfrecord", names="b.tfrecord")
    member = tarfile.TarInfo("0.png")
    member.size = min(length, (1 << 63) - 1)
    (tmp_path / "c.tar").write_bytes(member.tobuf() + bytes(1024))
    assert taken(lambda: refusal(find_images, tmp_path / "c.tar", names="c.tar")) < 16


def test_text_of_a_png_that_unpacks_to_more(tmp_path):
    content = encoded(PIXELS[0])
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(200 << 20))
        packed = text.getvalue()[31 : archive.infolist()[0].compress_size + 31]
    bomb = content[:33] + chunk(b"zTXt", b"Comment\0\0\x78\x01" + packed) + content[33:]
    assert taken(lambda: said_in_one_line(lambda: decode(bomb, 4, 3))) < 64
