"""Tar shards: which member of a sample is its image, what other programs put into tars, and indices that do and do not fit."""

import io
import subprocess
import sys
import tarfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from pdfast.data.formats import find_images
from pdfast.data.formats.tar import LINK
from pdfast.data.pictures import decode
from tests.data.archives import write_tar
from tests.data.errors import refusal
from tests.data.files import encoded, write_index


def grey(value: int) -> bytes:
    return encoded(np.full((4, 4), value, dtype=np.uint8))


def seen(path: Path) -> dict[str, tuple[int, int]]:
    """The name of each image, with its grey value and label."""
    found = find_images(path)
    labels = [-1] * len(found) if found.labels is None else found.labels.tolist()
    return {name: (int(decode(found.read(i), 4, 1)[0, 0, 0]), labels[i]) for i, name in enumerate(found.names)}


@pytest.mark.parametrize("order", [("jpg", "seg.png"), ("seg.png", "jpg"), ("depth.webp", "jpg", "seg.png")])
def test_the_image_is_the_member_with_an_images_extension_and_no_other(tmp_path, order):
    of = {"jpg": grey(1), "seg.png": grey(200), "depth.webp": grey(250), "JPG": grey(1)}
    write_tar(tmp_path / "a.tar", {f"0.{extension}": of[extension] for extension in order} | {"0.cls": b"3"}, "w")
    assert seen(tmp_path) == {"a.tar/0.jpg": (1, 3)}


def test_members_of_a_name_need_not_lie_together(tmp_path):
    members = {f"{i}.seg.png": grey(200) for i in range(3)} | {f"{i}.cls": b"%d" % i for i in range(3)}
    write_tar(tmp_path / "a.tar", members | {f"{i}.JPG": grey(i) for i in range(3)}, "w")
    assert seen(tmp_path) == {f"a.tar/{i}.JPG": (i, i) for i in range(3)}


@pytest.mark.parametrize("members", [("0.jpg", "0.png"), ("0.a.png", "0.b.png"), ("0.jpg", "0.seg.png", "0.jpeg")])
def test_two_images_of_a_name_are_refused(tmp_path, members):
    write_tar(tmp_path / "a.tar", {"1.jpg": grey(1)} | {name: grey(2) for name in members}, "w")
    message = refusal(find_images, tmp_path, names=tmp_path / "a.tar")
    first, *_, last = (name for name in members if "seg" not in name)
    assert f"more than one image of a name, {first} and {last}" in message


def test_hidden_members_are_passed_over(tmp_path):
    hidden = (
        "._0.jpg",
        "__MACOSX/._0.jpg",
        "__MACOSX/0.jpg",
        ".hidden/0.jpg",
        "PaxHeader/0.jpg",
        "PaxHeaders.17/0.jpg",
    )
    own = {"./0.jpg": grey(1), "./0.cls": b"7", "../up.jpg": grey(2), "a/PaxHeader.jpg": grey(3), "..jpg": grey(4)}
    members = {f"./{name}": b"no image" for name in hidden} | dict.fromkeys(hidden, b"no image")
    write_tar(tmp_path / "a.tar", members | own, "w")
    names = {"a.tar/./0.jpg": (1, 7), "a.tar/../up.jpg": (2, -1), "a.tar/a/PaxHeader.jpg": (3, -1)}
    assert seen(tmp_path) == names


def write_linked(path: Path, kind: bytes) -> None:
    """0.jpg is a link, beside its mask."""
    with tarfile.open(path, "w") as tar:
        for name, content in {"1.jpg": grey(1), "0.jpg": b"", "0.seg.png": grey(200)}.items():
            member = tarfile.TarInfo(name)
            if not content:
                member.type, member.linkname = kind, "1.jpg"
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
@pytest.mark.filterwarnings("ignore:1 of 1 tar shards are read through")
@pytest.mark.parametrize("index", [False, True])
def test_the_mask_of_a_linked_image_is_not_taken_for_it(tmp_path, kind, index):
    write_linked(tmp_path / "a.tar", kind)
    if index:
        members = [
            f"jpg 512 {len(grey(1))} 1.jpg",
            f"seg.png {3 * 512 + -(-len(grey(1)) // 512) * 512} {len(grey(200))} 0.seg.png",
        ]
        (tmp_path / "a.idx").write_text("\n".join(["v1.2 2", *members]) + "\n")
    assert seen(tmp_path) == {"a.tar/1.jpg": (1, -1)}
    assert find_images(tmp_path).passed_over == {LINK: 1}


def test_names_that_are_not_utf_8(tmp_path):
    write_tar(tmp_path / "a.tar", {"caf\udce9.png": grey(1), "café.png": grey(2)}, "w")
    assert seen(tmp_path) == {"a.tar/caf\udce9.png": (1, -1), "a.tar/café.png": (2, -1)}


def test_suffixes_in_capitals(tmp_path):
    write_tar(tmp_path / "A.TAR", {"0.PNG": grey(1)}, "w")
    assert seen(tmp_path) == seen(tmp_path / "A.TAR") == {"A.TAR/0.PNG": (1, -1)}


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "a.tar.XZ", "a.tfrecord.gz", "b.tar"])
def test_what_is_compressed_is_refused(tmp_path, name):
    write_tar(tmp_path / name, {"0.png": grey(1)}, "w:gz")
    for path in (tmp_path, tmp_path / name):
        message = refusal(find_images, path, names=tmp_path / name)
        assert "is compressed (" in message and "decompress it first" in message


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + b"\xff" * 512 + content[at + 512 :]


@pytest.mark.parametrize(
    "change, images",
    [
        (lambda content: damaged(content, 2048), 1),  # the header of the third: tarfile ends as if the tar did
        (lambda content: content + b"no tar", 4),
        (
            lambda content: content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512 + 512) + content,
            3,
        ),  # a block of zeros alone
        (lambda content: content[:1024], 0),
    ],
)
def test_a_tar_that_goes_on_behind_its_damage_or_end_is_a_problem(tmp_path, change, images):
    write_tar(tmp_path / "a.tar", {f"{i}.png": grey(i) for i in range(4)}, "w")
    write_tar(tmp_path / "b.tar", {"9.png": grey(9)}, "w")
    (tmp_path / "a.tar").write_bytes(change((tmp_path / "a.tar").read_bytes()))
    found = find_images(tmp_path)
    assert len(found) == 1 + images and list(found.problems) == [str(tmp_path / "a.tar")]


@pytest.mark.parametrize("index", [False, True])
def test_tars_one_behind_the_other_are_read_as_one(tmp_path, index):
    """As WebDataset reads them with ignore_zeros; samples of two archives may have one name."""
    first = {"0.png": grey(10), "0.cls": b"0", "1.png": grey(11), "1.cls": b"1"}
    second = {"2.png": grey(12), "2.cls": b"2", "1.cls": b"7", "1.png": grey(13)}
    contents = []
    for members in (first, second, {"9.txt": b""}, {"3.png": grey(14)}):
        contents.append(write_tar(tmp_path / "a.tar", members, "w").read_bytes())
        if index and len(contents) == 1:
            write_index(tmp_path / "a.tar")  # as wds2idx, whose reader ends where the first archive does
    (tmp_path / "a.tar").write_bytes(b"".join(contents))
    with pytest.warns(UserWarning, match="several tars, one behind the other") if index else nullcontext():
        images = seen(tmp_path)
    assert list(images.items()) == [
        ("a.tar/0.png", (10, 0)),
        ("a.tar/1.png", (11, 1)),
        ("a.tar#2/2.png", (12, 2)),
        ("a.tar#2/1.png", (13, 7)),
        ("a.tar#4/3.png", (14, -1)),
    ]
    assert index or not find_images(tmp_path).problems


MEMBERS = {
    "one/1.png": grey(10),
    "one/1.cls": b"3",
    "one/1.txt": b"",
    "._one": b"hidden",
    "two/2.cls": b"0",
    "two/2.png": grey(20),
    f"{'n' * 120}.png": grey(30),
    "z.png": grey(40),
}  # fmt: skip
WDS2IDX = Path(sys.executable).with_name("wds2idx")


def write_with_folders(path: Path, layout: int, members: dict[str, bytes] = MEMBERS) -> None:
    with tarfile.open(path, "w", format=layout) as tar:
        for folder in ("one", "two"):
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def read_through(monkeypatch):
    """The tars whose members were all looked at."""
    shards, really = [], tarfile.open

    def opened(name, *arguments, **options):
        shards.append(Path(name).name)
        return really(name, *arguments, **options)

    monkeypatch.setattr(tarfile, "open", opened)
    return shards


@pytest.mark.skipif(not WDS2IDX.exists(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.filterwarnings("ignore:1 of 1 tar shards are read through")
def test_an_index_of_wds2idx(tmp_path, layout, read_through):
    """GNU's form of long names makes wds2idx write where the name stands: that index does not fit."""
    write_with_folders(tmp_path / "a.tar", layout)
    expected = seen(tmp_path)
    subprocess.run([WDS2IDX, tmp_path / "a.tar"], check=True, capture_output=True)
    read_through.clear()
    assert seen(tmp_path) == expected and len(expected) == 4
    assert read_through == (["a.tar"] if layout == tarfile.GNU_FORMAT else [])


@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_both_versions_of_the_index(tmp_path, version, read_through):
    write_tar(
        tmp_path / "a.tar",
        {f"{i}.{kind}": content for i in range(3) for kind, content in (("png", grey(i)), ("cls", b"%d" % i))},
        "w",
    )
    write_index(tmp_path / "a.tar", version)
    read_through.clear()
    assert seen(tmp_path) == {f"a.tar/{i}.png": (i, i) for i in range(3)} and not read_through


def moved(index: str) -> str:
    head, *lines = index.splitlines()
    return "\n".join([head, *(line.replace(" 512 ", " 1024 ") for line in lines)]) + "\n"


UNFIT = {
    "empty": lambda index: "",
    "of a version to come": lambda index: index.replace("v1.2", "v2.0"),
    "of fewer lines": lambda index: index.rsplit("\n", 2)[0] + "\n",
    "another number of lines": lambda index: index.replace("v1.2 3", "v1.2 2").rsplit("\n", 2)[0] + "\n",
    "moved": moved,
    "of other names": lambda index: index.replace("0.png", "7.png"),
    "of other sizes": lambda index: index.replace(f" {len(grey(0))} ", " 9 "),
    "beyond the end": lambda index: index.replace(" 512 ", " 999999999999 "),
    "no text": lambda index: "\udcff\udcfe\0",
    "words": lambda index: "v1.2 1\nno index at all\n",
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_an_index_that_does_not_fit_is_left_alone(tmp_path, change):
    write_tar(tmp_path / "a.tar", {f"{i}.png": grey(i) for i in range(3)}, "w")
    write_tar(tmp_path / "b.tar", {f"{i}.png": grey(7 + i) for i in range(2)}, "w")
    write_index(tmp_path / "a.tar")
    index = tmp_path / "a.idx"
    index.write_bytes(change(index.read_text()).encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"1 of 2 tar shards are read through") as warned:
        images = seen(tmp_path)
    assert str(index) in str(warned[0].message) and "\n" not in str(warned[0].message)
    assert images == {f"a.tar/{i}.png": (i, -1) for i in range(3)} | {f"b.tar/{i}.png": (7 + i, -1) for i in range(2)}


def test_many_that_do_not_fit_are_one_warning(tmp_path):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": grey(1)}, "w")
        (tmp_path / f"{name}.idx").write_text("")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        find_images(tmp_path)
    (warning,) = warned
    assert "3 of 3 tar shards" in str(warning.message) and f"{tmp_path / 'a.idx'} (it is empty)" in str(warning.message)


def test_a_tar_that_was_exchanged_under_its_index(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": grey(i) for i in range(4)}, "w")
    write_index(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", {"x.json": bytes(700)} | {f"{i}.png": grey(10 + i) for i in range(4)}, "w")
    with pytest.warns(UserWarning, match="read through"):
        assert seen(tmp_path) == {f"a.tar/{i}.png": (10 + i, -1) for i in range(4)}


def test_a_name_with_blanks_in_an_index(tmp_path):
    write_tar(tmp_path / "a.tar", {"my cat 1.png": grey(1), "my cat 1.cls": b"5", "2.png": grey(2)}, "w")
    write_index(tmp_path / "a.tar")
    with pytest.warns(UserWarning, match="a name with a blank"):
        assert seen(tmp_path) == {"a.tar/my cat 1.png": (1, 5), "a.tar/2.png": (2, -1)}
