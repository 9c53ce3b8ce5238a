"""What a data set is known by: the contents of its images and labels, wherever they lie and whatever they are called."""

import os
import shutil

import numpy as np
import pytest

from pdfast.data import identity, load_source
from pdfast.data.formats import find_images
from tests.data.archives import write_tar
from tests.data.files import encoded, write_tfrecord

N = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
OTHERS = 255 - PIXELS


def folder_of(path, pixels, names="{}.bmp"):
    path.mkdir(parents=True)
    for i, image in enumerate(pixels):
        (path / names.format(i)).write_bytes(encoded(image, "BMP"))
    return path


def tar_of(path, pixels):
    members = {f"{i}.bmp": encoded(image, "BMP") for i, image in enumerate(pixels)}
    return write_tar(path.with_suffix(".tar"), members, "w")


def tfrecord_of(path, pixels):
    write_tfrecord(path.with_suffix(".tfrecord"), [(encoded(image, "BMP"), None) for image in pixels])
    return path.with_suffix(".tfrecord")


KINDS = pytest.mark.parametrize("write", [folder_of, tar_of, tfrecord_of])


def known_by(path, loader="auto", size=8):
    return load_source(str(path), image_size=size, channels=3, loader=loader).identity.hashes.everything


@KINDS
def test_other_images_of_equal_names_and_sizes_are_another_set(tmp_path, write):
    one, other = write(tmp_path / "one", PIXELS), write(tmp_path / "other", OTHERS)
    nearly = PIXELS.copy()
    nearly[3, 4, 4, 1] ^= 1
    assert len({known_by(one), known_by(other), known_by(write(tmp_path / "nearly", nearly))}) == 3
    assert known_by(one) == known_by(one, "portable") != known_by(one, size=4)
    assert len(known_by(one)) == 64 and int(known_by(one), 16) >= 0


@KINDS
def test_moved_copied_or_touched_it_is_the_same(tmp_path, monkeypatch, write):
    path = write(tmp_path / "one", PIXELS)
    before = known_by(path)
    monkeypatch.chdir(tmp_path)
    assert known_by(path.name) == known_by(f"./{path.name}") == known_by(f"../{tmp_path.name}/{path.name}") == before
    moved = tmp_path / "elsewhere" / f"two{path.suffix}"
    moved.parent.mkdir()
    os.rename(path, moved)
    for file in moved.iterdir() if moved.is_dir() else [moved]:
        os.utime(file, (1, 1))
    assert known_by(moved) == before


def test_names_do_not_count_but_the_order_and_the_labels_do(tmp_path):
    before = known_by(folder_of(tmp_path / "a", PIXELS))
    assert known_by(folder_of(tmp_path / "b", PIXELS, "image-{}.bmp")) == before
    assert known_by(folder_of(tmp_path / "c", PIXELS[::-1])) != before
    labelled = {}
    for labels in ("0", "1"):
        (tmp_path / "a/labels.csv").write_text(f"0.bmp,{labels}\n")
        labelled[labels] = known_by(tmp_path / "a")
    assert len({before, *labelled.values()}) == 3
    alone = load_source(str(tmp_path / "a"), image_size=8, channels=3).identity.hashes.images
    assert alone == before == identity.of_files(find_images(tmp_path / "b"), 8, 3).images


def test_of_a_set_that_is_large_an_even_sample_is_read(tmp_path, monkeypatch):
    path = folder_of(tmp_path / "a", np.tile(PIXELS, (10, 1, 1, 1)))
    size = (path / "0.bmp").stat().st_size
    whole = known_by(path)
    read = []
    original = identity.EncodedImages.read
    monkeypatch.setattr(identity.EncodedImages, "read", lambda self, i: read.append(i) or original(self, i))
    monkeypatch.setattr(identity, "EVERYTHING", 12 * size)

    def known():
        read.clear()
        found = find_images(path)
        return identity.of_files(found, 8, 3)

    sampled = known()
    assert len(read) == len(set(read)) == 12 and max(read) > 40 and min(read) < 20
    assert sampled == known() != whole
    shutil.rmtree(path)
    folder_of(path, np.tile(OTHERS, (10, 1, 1, 1)))
    assert known() != sampled


def test_a_file_that_cannot_be_read_is_another_one(tmp_path):
    found = find_images(folder_of(tmp_path / "a", PIXELS))
    before = identity.of_files(found, 8, 3)
    (tmp_path / "a/2.bmp").unlink()
    assert identity.of_files(found, 8, 3) != before
