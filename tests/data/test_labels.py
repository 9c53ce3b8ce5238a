"""`labels.csv` as spreadsheets, macOS and people write it."""

import unicodedata

import numpy as np
import pytest

from pdfast.data.formats import find_images
from tests.data.errors import refusal
from tests.data.files import encoded

PNG = encoded(np.zeros((4, 4), dtype=np.uint8))


@pytest.fixture
def labels(tmp_path):
    """Of the images a, b and one of a name with an accent, in this order, what such a file gives."""

    def of(content: bytes | str, accented: str = "é.png") -> list[int]:
        for name in ("a.png", "b.png", accented):
            (tmp_path / name).write_bytes(PNG)
        (tmp_path / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        found = find_images(tmp_path)
        assert sorted(found.names) == found.names == sorted(["a.png", "b.png", accented])
        return found.labels.tolist()

    return of


TEXT = "a.png,3\nb.png,1\né.png,2\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("header", ["", "name,label\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_headers_and_ends_of_lines(labels, encoding, header, end):
    assert labels((header + TEXT).replace("\n", end).encode(encoding)) == [3, 1, 2]


@pytest.mark.parametrize("mark, encoding", [(b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")])
def test_both_orders_of_utf_16(labels, mark, encoding):
    assert labels(mark + TEXT.encode(encoding)) == [3, 1, 2]


@pytest.mark.parametrize("of_file, of_row", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_an_accent_may_be_a_character_of_its_own(labels, of_file, of_row):
    accented = unicodedata.normalize(of_file, "é.png")
    row = unicodedata.normalize(of_row, "é.png")
    assert sorted(labels(f"{row},2\na.png,0\nb.png,0\n", accented)) == [0, 0, 2]


def test_names_are_the_bytes_that_they_are(labels):
    """A Latin-1 name on the disk, and in the list that `ls` made of it."""
    assert labels(b"a.png,0\nb.png,1\n\xe9.png,2\n", "\udce9.png") == [0, 1, 2]


def test_a_latin_1_list_of_other_names_says_what_it_does_not_use(labels):
    with pytest.warns(UserWarning, match=r"1 of 3 names of .*labels.csv are of no image: '\\udce9.png'"):
        assert labels(TEXT.encode("latin-1")) == [3, 1, -1]


def test_blank_lines_and_spaces(labels):
    assert labels("\n\na.png, 3 \n  \n,\nb.png,1\né.png,-1\n") == [3, 1, -1]


@pytest.mark.parametrize(
    "content, row, what",
    [
        ("\na.png,1\n\n\nb.png,cat\n", 5, "'b.png,cat' is not NAME,LABEL"),
        ("name,label\n\na.png,²\n", 3, "'a.png,²' is not NAME,LABEL"),
        ("a.png,²\n", 1, "'a.png,²' is not NAME,LABEL"),
        ("a.png,--1\n", 1, "is not NAME,LABEL"),
        ("a.png,1.0\n", 1, "is not NAME,LABEL"),
        ("a.png,٣\n", 1, "is not NAME,LABEL"),
        ("name,label\nname,label\n", 2, "is not NAME,LABEL"),
        ("a.png;1\n", 1, "is not NAME,LABEL"),
        ("a.png,1,2\n", 1, "is not NAME,LABEL"),
        ("b.png,1\na.png," + "9" * 5000 + "\n", 2, "is not NAME,LABEL"),
        ("a.png,1\n" + "x" * 200_000 + ",2\n", 2, "is not NAME,LABEL"),
        ('a.png,1\n"b.png,2\n', 2, "is not NAME,LABEL"),
        ("a.png,1\nb.png,0\n\na.png,2\n", 4, "'a.png' has the label 2 and, above, 1"),
    ],
)
def test_a_bad_row_is_named_by_its_line(labels, tmp_path, content, row, what):
    message = refusal(labels, content, names=tmp_path / "labels.csv")
    assert f", row {row}: " in message and what in message and len(message) < 400


def test_a_row_may_be_repeated(labels):
    assert labels("a.png,1\na.png,1\nb.png,0\n") == [1, 0, -1]


@pytest.mark.parametrize("label", [1 << 31, 1 << 63, 10**90])
def test_a_label_that_numbers_no_class(labels, tmp_path, label):
    message = refusal(labels, f"b.png,0\na.png,{label}\n", names=tmp_path / "labels.csv")
    assert (
        f"row 2: 'a.png' has the label {label}: number the classes from 0" in message
        and "at most 2147483647" in message
    )


@pytest.mark.parametrize("content", ["", "\n\n", "name,label\n", "images/a.png,1\nA.PNG,1\n"])
def test_a_list_of_nothing_there_is_refused(labels, tmp_path, content):
    message = refusal(labels, content, names=tmp_path / "labels.csv")
    assert "names none of the 3 images beside it" in message and "they are called 'a.png'" in message


@pytest.mark.parametrize("content", [b"\0" * 9, TEXT.encode("utf-16-le"), b"\xff\xfea", PNG])
def test_what_is_no_text(labels, tmp_path, content):
    assert "is no text: save it as CSV" in refusal(labels, content, names=tmp_path / "labels.csv")


def test_a_list_may_label_class_folders_of_which_one_is_empty(tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
    (tmp_path / "y" / "1.png").write_bytes(PNG)
    (tmp_path / "labels.csv").write_text("y/1.png,4\n")
    assert find_images(tmp_path).labels.tolist() == [4]
