"""Formats that encoded images come in, a file each: what a path holds, and where in it each image lies.

Nothing is unpacked: a name inside a tar is a name, never a path.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pdfast.data.encoded import FILES, EncodedImages
from pdfast.data.formats import names
from pdfast.data.formats.folder import found_in, from_folder, look_into
from pdfast.data.formats.label_file import LABEL_FILE
from pdfast.data.formats.shards import refuse_compressed
from pdfast.data.formats.tar import SHARDS, from_tars
from pdfast.data.formats.tfrecord import TFRECORDS, from_tfrecords
from pdfast.data.pictures import SUFFIXES
from pdfast.io.errors import UsageError


def find_images(path: Path) -> EncodedImages | None:
    """Return the encoded images of a folder of image files, of tar shards or TFRecord files (with class subfolders, or a
    `labels.csv` of names and labels, for image files), or of one such file; None where `path` is no such thing.

    UsageError, in one line, where it holds no images, or several of these, or cannot be read.
    """
    try:
        if path.is_dir():
            found = _from_any(path)
            found.passed_over.update(_others(path, found))
            return found
        if not path.is_file():
            return None
        if names.is_compressed(path):
            refuse_compressed(path)
        if names.is_tar(path):
            return from_tars([path])
        return from_tfrecords([path]) if names.is_tfrecord(path) else None
    except OSError as error:
        raise UsageError(f"cannot read {error.filename} ({error.strerror}): allow it, or give other data") from None


def _others(folder: Path, found: EncodedImages) -> Iterator[str]:
    """Yield what each thing is that lies in the folders of the images and was not taken."""
    taken = {os.path.dirname(folder / LABEL_FILE): {LABEL_FILE}}  # of each folder; as text, for there may be millions
    for file in found.files:
        place, name = os.path.split(file)
        taken.setdefault(place, set()).add(name)
        if found.kind == SHARDS:
            taken[place].add(file.with_suffix(".idx").name)
    top = next(iter(taken))
    for place, of_images in sorted(taken.items()):
        for name in sorted(set(os.listdir(place or os.curdir)) - of_images):
            if (child := os.path.join(place, name)) not in taken:
                what = names.what_is(Path(child))
                yield f"deeper {what}" if what == "folders" and place != top else what


def _from_any(folder: Path) -> EncodedImages:
    """Of the one kind of data that a folder holds. What is hidden, or none of these kinds, is passed over."""
    everything = sorted(child for child in folder.iterdir() if not names.hidden(child.name))
    of_suffix = {SHARDS: names.is_tar, TFRECORDS: names.is_tfrecord, ".npy or .npz arrays": names.is_array}
    kinds = {kind: [f for f in filter(named, everything) if f.is_file()] for kind, named in of_suffix.items()}
    top, classes = look_into(folder)
    kinds[FILES] = [*top, *(file for images in classes.values() for file in images)]
    there = {kind: found for kind, found in kinds.items() if found}
    if len(there) > 1:
        found = " and ".join(f"{len(found)} {kind} ({found[0].name})" for kind, found in there.items())
        raise UsageError(f"{folder} holds {found}: it is not clear which are meant, so move the others elsewhere")
    kind = next(iter(there), None)
    if kind == SHARDS:
        return from_tars(there[SHARDS])
    if kind == TFRECORDS:
        return from_tfrecords(there[TFRECORDS])
    if kind == FILES:
        return from_folder(folder, top, classes)
    if kind is not None:
        example = there[kind][0]
        raise UsageError(f"{folder} holds arrays, which are given one at a time: name one, such as {example}")
    for file in filter(names.is_compressed, everything):
        refuse_compressed(file)
    suffixes = ", ".join(sorted(SUFFIXES))
    raise UsageError(
        f"{folder} holds no image files, directly or one folder down, only {found_in(folder)}: give one that does ({suffixes})"
    )
