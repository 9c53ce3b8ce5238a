"""`python -m pdfast.data.prepare images`: arrays and tar shards of images in files, and what happens when it is stopped."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pdfast.data import convert as module
from pdfast.data import load_source
from pdfast.data.convert import convert
from pdfast.data.formats import find_images
from pdfast.data.split import channel_means_and_stds
from pdfast.io.errors import Interrupted
from tests.commands import call
from tests.data.errors import refusal
from tests.data.files import encoded

PIXELS = np.random.default_rng(3).integers(0, 256, (10, 12, 9, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes, and parts of 4 images."""
    monkeypatch.setattr(module, "PART", 4)
    for i, pixels in enumerate(PIXELS):
        file = tmp_path / "images" / "ab"[i // 6] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels))
    return tmp_path / "images"


def everything(path, size=8):
    batch = load_source(str(path), image_size=size, channels=3).take(torch.arange(10))
    return batch.x, batch.cond


@pytest.mark.parametrize("out", ["new/out.npz", "out"])
def test_what_is_written_is_what_would_have_been_read(folder, tmp_path, out, capsys):
    out = tmp_path / out
    assert call("data.prepare", "images", str(folder), str(out), "--size", "8", "--jobs", "2") == 0
    (images, labels), (expected, their_labels) = everything(out), everything(folder)
    assert torch.equal(images, expected) and torch.equal(labels, their_labels)
    said = capsys.readouterr().out
    mean, std = channel_means_and_stds(expected.numpy())
    assert f"channel mean  {' '.join(f'{m:.4f}' for m in mean)}\n" in said
    assert f"channel std   {' '.join(f'{s:.4f}' for s in std)}\n" in said
    assert "images        10 of 8x8x3, and 0 left out\nclasses       2\n" in said
    with Image.open(out.with_name("out.png")) as sheet:
        assert sheet.size == (8 * 65 - 1, 64)  # the first part's four, eight times as large, a line between
    assert not list(tmp_path.rglob(".*.parts"))


def test_the_bad_are_left_out_and_named(folder, tmp_path):
    (folder / "a/2.png").write_bytes(b"")
    arguments = find_images(folder), tmp_path / "out.npz", 8, 3
    assert "1 of 10 images cannot be used, more than --max-bad 0.05" in refusal(
        convert, *arguments, jobs=1, max_bad=0.05, names="a/2.png"
    )
    done = convert(*arguments, jobs=1, max_bad=0.1)
    assert (done.images, done.classes, done.bad) == (9, 2, {"a/2.png": "empty"})
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["labels"].tolist() == [0] * 5 + [1] * 4 and len(arrays["images"]) == 9


@pytest.mark.parametrize("out", ["out.npz", "out"])
def test_a_part_of_bad_images_alone(folder, tmp_path, out):
    for i in range(4):
        (folder / f"a/{i}.png").write_bytes(b"")
    done = convert(find_images(folder), tmp_path / out, 8, 3, jobs=1, max_bad=0.4)
    assert (done.images, len(done.shown)) == (6, 4)
    batch = load_source(str(tmp_path / out), image_size=8, channels=3, num_classes=2).take(torch.arange(6))
    assert batch.cond.tolist() == [0, 0, 1, 1, 1, 1]


def test_stopped_while_the_shards_are_put_together(folder, tmp_path, monkeypatch):
    arguments = find_images(folder), tmp_path / "out", 8, 3
    moves, rename = [], module.os.rename

    def stop(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise SystemExit
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "rename", lambda a, b: stop(a, b) if str(a).endswith("shard.tar") else rename(a, b))
        with pytest.raises(SystemExit):
            convert(*arguments, jobs=1, max_bad=0.0)
    assert len(moves) == 2 and not (tmp_path / "out").exists()
    convert(*arguments, jobs=1, max_bad=0.0)
    assert torch.equal(everything(tmp_path / "out")[0], everything(folder)[0])


def test_a_stopped_conversion_goes_on(folder, tmp_path, monkeypatch):
    arguments = find_images(folder), tmp_path / "out.npz", 8, 3

    def stop(futures):
        futures[0].result()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "as_completed", stop)
        with pytest.raises(Interrupted, match="the same command goes on"):
            convert(*arguments, jobs=1, max_bad=0.5)
    assert not (tmp_path / "out.npz").exists()
    facts = tmp_path / ".out.npz.parts/000000/facts.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"bad": {"a mark": "that shows it is not made again"}}))
    assert "a mark" in convert(*arguments, jobs=1, max_bad=0.5).bad
    assert torch.equal(everything(tmp_path / "out.npz")[0], everything(folder)[0])
    # Of another conversion, parts are not used.
    facts.parent.mkdir(parents=True)
    (facts.parents[1] / "key").write_text("another")
    assert not convert(*arguments, jobs=1, max_bad=0.5).bad


@pytest.mark.parametrize("out", ["out.npz", "out"])
def test_what_was_converted_of_other_images_is_made_again(folder, tmp_path, monkeypatch, out):
    """Files exchanged for others of their names and sizes, between a stop and the same command."""
    for file in folder.glob("*/*.png"):
        with Image.open(file) as image:
            image.save(file.with_suffix(".bmp"))
        file.unlink()
    arguments = find_images(folder), tmp_path / out, 8, 3
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "_join", lambda *_, **__: sys.exit())
        convert(*arguments, jobs=1, max_bad=0.5)
    files = sorted(folder.glob("*/*.bmp"))
    assert len(files[0].read_bytes()) == len(files[-1].read_bytes())
    files[0].write_bytes(files[-1].read_bytes())
    for part in ("000000", "000001"):
        facts = tmp_path / f".{out}.parts" / part / "facts.json"
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"bad": {part: "kept"}}))
    assert convert(find_images(folder), tmp_path / out, 8, 3, jobs=1, max_bad=0.5).bad == {"000001": "kept"}
    assert torch.equal(everything(tmp_path / out)[0], everything(folder)[0])


@pytest.mark.parametrize("out", ["out.npz", "out"])
def test_a_sample_without_a_label_among_others_is_left_out(tmp_path, capsys, out):
    """`--data` refuses a label of -1 in an array, and shards where it is one too many."""
    folder, out = tmp_path / "images", tmp_path / out
    folder.mkdir()
    for i, pixels in enumerate(PIXELS):
        (folder / f"{i}.png").write_bytes(encoded(pixels))
    (folder / "labels.csv").write_text("".join(f"{i}.png,{i % 3}\n" for i in range(9)))
    command = "images", str(folder), str(out), "--size", "8", "--jobs", "1"
    assert call("data.prepare", *command) == 2
    assert "1 of 10 images cannot be used, more than --max-bad 0.001 allows; the first: 9.png (no label)" in (
        capsys.readouterr().err
    )
    assert call("data.prepare", *command, "--max-bad", "0.1") == 0
    assert "left out      9.png: no label\n" in capsys.readouterr().out
    source = load_source(str(out), image_size=8, channels=3, num_classes=3)
    assert source.num_images == 9 and source.take(torch.arange(9)).cond.tolist() == 3 * [0, 1, 2]


@pytest.mark.parametrize(
    "source, out, message",
    [
        ("nowhere", "out.npz", "there are no image files, tar shards or TFRecord at"),
        ("images", "out.txt", "name a file that ends in .npz, or a new folder for tar shards"),
        ("images", "images", "name a file that ends in .npz, or a new folder for tar shards"),
    ],
)
def test_what_cannot_be_done(folder, tmp_path, capsys, source, out, message):
    assert call("data.prepare", "images", str(tmp_path / source), str(tmp_path / out), "--size", "8") == 2
    assert message in capsys.readouterr().err
