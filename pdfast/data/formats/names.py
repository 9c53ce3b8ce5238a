"""What the names of files and of members of archives say."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HIDDEN = re.compile(r"(^|/)(\.(?!\.?(/|$))|(__MACOSX|PaxHeaders?(\.\d+)?)(/|$))")
ARRAYS = {".npy", ".npz"}
TFRECORD = r"\.(tfrecords?|tfrec)(-\d+-of-\d+)?"
COMPRESSED = re.compile(rf"(\.(tgz|tbz2?|txz|tzst)|(\.tar|{TFRECORD})\.(gz|bz2|xz|zst|lz4|zip|z))$", re.IGNORECASE)
OTHER_IMAGES = {".avif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".ppm", ".tif", ".tiff"}
SHOWN = 5  # suffixes that `in_words` names


def hidden(name: str) -> bool:
    """Tell whether a path, its parts apart by "/", is not meant for people: .NAME, or what macOS (._NAME, __MACOSX) and
    other programs (PaxHeader) put beside each file to describe it."""
    return HIDDEN.search(name) is not None


def sample_of(name: str) -> tuple[tuple[str, str], str]:
    """Of a tar's member, the folder and name up to the first dot, which make a sample, and what follows."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder, stem), extension


def is_array(path: Path) -> bool:
    return path.suffix.lower() in ARRAYS


def is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def is_tfrecord(path: Path) -> bool:
    """Also of the names that TFDS gives, x-train.tfrecord-00000-of-00002."""
    return re.search(rf"{TFRECORD}$", path.name, re.IGNORECASE) is not None


def is_compressed(path: Path) -> bool:
    """Tell whether it is named as a tar or TFRecord that must be unpacked before."""
    return COMPRESSED.search(path.name) is not None


def what_is(path: Path) -> str:
    """Return what a file or folder that is passed over is, for people."""
    if hidden(path.name):
        return "hidden"
    if path.is_dir():
        return "folders"
    if path.is_symlink() and not path.exists():
        return "dangling links"
    return path.suffix.lower() or "without suffix"


def in_words(found: Iterable[str]) -> str:
    """Return how many there are of what `what_is` says: `40 .webm, 3 .txt`."""
    counts = Counter(found)
    words = [f"{count} {what}" for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]]
    return ", ".join([*words, "..."] if len(counts) > SHOWN else words) or "nothing"
