"""Formats that encoded images come in, a file each: what a path holds, and where in it each image lies.

Nothing is unpacked: a name inside a tar is a name, never a path.
"""

from pathlib import Path

from pdfast.data.encoded import EncodedImages
from pdfast.data.formats.folder import from_folder
from pdfast.data.formats.tar import TARS, from_tars
from pdfast.data.formats.tfrecord import TFRECORDS, from_tfrecords
from pdfast.errors import UsageError


def find_images(path: Path) -> EncodedImages | None:
    """The encoded images of a folder of image files, of tar shards or TFRecord files (with class subfolders, or a
    `labels.csv` of names and labels, for image files), or of one such file; None where `path` is no such thing.

    UsageError, in one line, where it holds no images or cannot be read.
    """
    try:
        if path.is_dir():
            for suffixes, find in ((TARS, from_tars), (TFRECORDS, from_tfrecords)):
                shards = sorted(f for f in path.iterdir() if f.suffix in suffixes and f.name[0] != ".")
                if shards:
                    return find(shards)
            return from_folder(path)
        if path.suffix in TARS:
            return from_tars([path])
        return from_tfrecords([path]) if path.suffix in TFRECORDS else None
    except OSError as error:
        raise UsageError(f"cannot read {error.filename} ({error.strerror}): allow it, or give other data") from None
