"""What lies among images and is none that is read is counted in the first line that is said of them."""

import shlex
import tarfile

import numpy as np
import pytest

from pdfast.data import load_source
from tests.commands import call
from tests.data.archives import write_tar
from tests.data.files import encoded, solid, write_index, write_tfrecord

GREY = encoded(np.full((4, 4), 9, dtype=np.uint8))


LITTER = {"hidden": 2, ".jfif": 1, ".tif": 1, "dangling links": 1, "without suffix": 1}


def said(path):
    return load_source(str(path), image_size=4, channels=1).description


def litter(folder):
    """One link to nowhere, two of other formats, two hidden, a text."""
    (folder / "link.png").symlink_to("nowhere.png")
    for name in ("a.TIF", "b.jfif", ".hidden.png", "._0.png", "README"):
        (folder / name).write_bytes(GREY)


def passed_over(line):
    """What a line counts, by what it is."""
    words = line.partition("(passed over: ")[2].partition(")")[0]
    return {what: int(count) for count, _, what in (entry.partition(" ") for entry in words.split(", ") if entry)}


def test_among_files(tmp_path):
    solid(tmp_path / "a/0.png", 1, "L")
    assert said(tmp_path / "a").startswith("a: 1 image files, as images")
    litter(tmp_path / "a")
    (tmp_path / "a/labels.csv").write_text("0.png,0\n")
    line = said(tmp_path / "a")
    assert line.startswith("a: 1 image files (passed over: 2 hidden, ") and "), 1 classes, as images" in line
    assert passed_over(line) == LITTER


def test_among_class_folders(tmp_path, capsys):
    for name in ("a/0.png", "b/1.png", "b/deep/2.png", "b/deeper/3.png", ".git/4.png"):
        solid(tmp_path / "set" / name, 1, "L")
    litter(tmp_path / "set/a")
    counted = LITTER | {"hidden": 3, "deeper folders": 2}
    assert passed_over(said(tmp_path / "set")) == counted
    command = "images", str(tmp_path / "set"), str(tmp_path / "out.npz"), "--size", "4", "--jobs", "1"
    assert call("data.prepare", *command) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("found         2 image files (passed over: 3 hidden, ") and passed_over(first) == counted


@pytest.mark.parametrize("index", [False, True])
def test_among_and_in_tars(tmp_path, index):
    members = ["0.png", "0.cls", "0.json", "1.tiff", "1.cls", "._0.png", "2.jfif"]
    path = write_tar(tmp_path / "a.tar", {name: b"0" if "cls" in name else GREY for name in members}, "w")
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "rest").mkdir()
    counted = {".json": 1, ".tiff": 1, "hidden": 1, ".jfif": 1, "folders": 1}
    if index:
        write_index(path)
    else:
        counted["links in tar shards"] = 1
        with tarfile.open(path, "a") as tar:
            link = tarfile.TarInfo("9.png")
            link.type, link.linkname = tarfile.SYMTYPE, "0.png"
            tar.addfile(link)
    assert "1 images in 1 tar shards (passed over: " in said(tmp_path) and passed_over(said(tmp_path)) == counted


def test_among_tfrecord_files(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", [(GREY, 0)])
    (tmp_path / "features.json").write_text("{}")
    assert "1 images in 1 TFRecord files (passed over: 1 .json), 1 classes" in said(tmp_path)
    assert passed_over(said(tmp_path / "a.tfrecord")) == {}


@pytest.mark.parametrize("name", ["digits", "new.npz"])
def test_the_next_command_names_what_was_written(tmp_path, monkeypatch, capsys, name):
    """A folder that is called as the built-in images are, too."""
    monkeypatch.chdir(tmp_path)
    solid(tmp_path / "a/0.png", 1, "L", size=(8, 8))
    assert call("data.prepare", "images", "a", name, "--size", "8", "--channels", "1", "--jobs", "1") == 0
    spec = shlex.split(capsys.readouterr().out.splitlines()[-1])[-1]
    assert load_source(spec, image_size=8, channels=1).num_images == 1


def test_images_of_one_pixel_are_refused_before_the_work(tmp_path, capsys):
    solid(tmp_path / "a/0.png", 1, "L")
    assert call("data.prepare", "images", str(tmp_path / "a"), str(tmp_path / "out"), "--size", "1") == 2
    assert "--size is at least 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
