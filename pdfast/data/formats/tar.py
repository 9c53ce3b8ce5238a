"""Tar shards, as WebDataset reads them, and their indices."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pdfast.data.encoded import EncodedImages
from pdfast.data.formats.shards import scan_shards
from pdfast.data.pictures import SUFFIXES

TARS = {".tar"}


def from_tars(shards: list[Path]) -> EncodedImages:
    """WebDataset: members of one name up to the first dot are a sample, of which the image and `cls`, a number, are used. An
    index of `wds2idx` beside a shard, NAME.idx, saves reading through it."""
    return scan_shards("tar shards", shards, _scan_tar)


def _scan_tar(shard: Path, found: EncodedImages) -> None:
    index = shard.with_suffix(".idx")
    members = _indexed(index) if index.exists() else _members(shard)
    sample, image, label = None, None, -1

    def flush() -> None:
        if image:
            found.add(f"{shard.name}/{image[0]}", label, *image[1:])

    with open(shard, "rb") as content:
        for name, offset, size in members:
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (folder, stem) != sample:
                flush()
                sample, image, label = (folder, stem), None, -1
            if f".{extension.lower().rpartition('.')[2]}" in SUFFIXES:
                image = (name, offset, size)
            elif extension == "cls":
                text = os.pread(content.fileno(), size, offset).strip()
                label = int(text) if text.isdigit() else -1
    flush()


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    end = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.isfile():
                if member.offset_data + member.size > end:
                    raise ValueError("it ends early")
                yield member.name, member.offset_data, member.size


def _indexed(index: Path) -> Iterator[tuple[str, int, int]]:
    """Lines of `extension offset size name` after the first, as DALI's wds2idx writes them."""
    lines = index.read_text().splitlines()
    for line in lines[1:]:
        fields = line.split()
        for i in range(0, len(fields), 4):
            _, offset, size, name = fields[i : i + 4]
            yield name, int(offset), int(size)
