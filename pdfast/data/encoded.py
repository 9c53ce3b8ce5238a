"""Encoded images on disk, by number: files in a folder, members of tar shards, records of TFRecord files.

Only where each lies is kept in memory. `pdfast.data.formats` finds them.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from pdfast.data.pictures import BadImage
from pdfast.data.source import LARGEST_LABEL, NUMBERED
from pdfast.io.errors import UsageError

FILES = "image files"
SHOWN = 12  # sorts of other things that are counted in a line


def label_from(text: str) -> int | None:
    """Return a label as it is written in decimal digits, None where the text is no such number."""
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,99}\s*", text) else None


class EncodedImages:
    """Image i is a range of the bytes of one of `files`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        """What holds them, for people: `image files`, `tar shards`, `TFRecord files`."""
        self.files: list[Path] = []
        self.names: list[str] = []
        self.labels: np.ndarray | None = None
        """int64 [N], -1 where there is none though others have one; None where none has."""
        self.problems: dict[str, str] = {}
        """What is wrong with files that hold many, by name; what could be read of them is here."""
        self.passed_over: Counter[str] = Counter()
        """How many things were found that are no images, by what they are, for people."""
        self.places = np.empty((0, 3), dtype=np.int64)
        """Of each image: which file, offset, size in bytes."""
        self._found: list[tuple[int, int, int, int]] = []

    def add(self, name: str, label: int, offset: int, size: int) -> None:
        """The next image, in the last of `files`; a negative label is none. UsageError for one that numbers no class."""
        if label > LARGEST_LABEL:
            raise UsageError(f"{self.files[-1]}: {name} has the label {label}: {NUMBERED}")
        self.names.append(name)
        self._found.append((max(label, -1), len(self.files) - 1, offset, size))

    def done(self) -> "EncodedImages":
        found = np.array(self._found, dtype=np.int64).reshape(-1, 4)
        self._found = []
        self.places = np.ascontiguousarray(found[:, 1:])
        self.labels = found[:, 0].copy() if (found[:, 0] >= 0).any() else None
        return self

    @property
    def description(self) -> str:
        """How many images in what, and how much else lies there, for people."""
        found = f"{len(self)} {FILES}" if self.kind == FILES else f"{len(self)} images in {len(self.files)} {self.kind}"
        others = [f"{count} {what}" for what, count in self.passed_over.most_common(SHOWN)]
        return f"{found} (passed over: {', '.join(others)})" if others else found

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """Return the bytes of image i. BadImage where they are not there any more."""
        file, offset, size = self.places[i].tolist()
        try:
            with open(self.files[file], "rb", buffering=0) as opened:
                content = os.pread(opened.fileno(), size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise BadImage("its file has become shorter")
        return content
