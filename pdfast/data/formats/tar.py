"""Tar shards, as WebDataset reads them."""

import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pdfast.data.encoded import EncodedImages, label_from
from pdfast.data.formats.names import OTHER_IMAGES, hidden, sample_of
from pdfast.data.formats.shards import scan_shards
from pdfast.data.formats.tar_index import BLOCK, Unfit, behind_zeros, indexed
from pdfast.data.pictures import SUFFIXES
from pdfast.io.errors import UsageError

SHARDS = "tar shards"
LINK = "links in tar shards"
LABEL = "cls"
LONGEST_LABEL = 100  # bytes


class _Member(NamedTuple):
    """An image or a label: its name, and what of that follows the first dot; no offset where it is a link."""

    name: str
    extension: str
    offset: int | None
    size: int


def from_tars(shards: list[Path]) -> EncodedImages:
    """WebDataset: members of one name up to the first dot are a sample, of which the image and `cls`, a number, are used. An
    index of `wds2idx` beside a shard, NAME.idx, saves reading through it; one that does not fit is left alone, with a warning.
    """
    unfit: dict[Path, str] = {}
    found = scan_shards(SHARDS, shards, lambda shard, found: _scan(shard, found, unfit))
    if unfit:
        index, reason = next(iter(unfit.items()))
        warnings.warn(
            f"{len(unfit)} of {len(shards)} tar shards are read through, for their indices do not fit; the first: {index} "
            f"({reason}): make it again with wds2idx, or delete it",
            stacklevel=2,
        )
    return found


def _scan(shard: Path, found: EncodedImages, unfit: dict[Path, str]) -> None:
    index, members = shard.with_suffix(".idx"), None
    if index.is_file():
        try:
            members = iter(indexed(shard, index))
        except Unfit as error:
            unfit[index] = str(error)
    samples: dict[tuple[str, str], list[_Member]] = {}
    place, archives = shard.name, 1
    with open(shard, "rb") as content:

        def add_samples() -> None:
            for sample in samples.values():
                _add(shard, place, sample, content.fileno(), found)
            samples.clear()

        try:
            for member in members or _members(shard):
                if member is None:  # names of samples may be those of the archive before
                    add_samples()
                    archives += 1
                    place = f"{shard.name}#{archives}"
                    continue
                name, offset, size = member
                key, extension = sample_of(name)
                extension = extension.lower()
                suffix = f".{extension.rpartition('.')[2]}"
                if hidden(name) or suffix in OTHER_IMAGES:
                    found.passed_over["hidden" if hidden(name) else suffix] += 1
                elif extension == LABEL or suffix in SUFFIXES:
                    samples.setdefault(key, []).append(_Member(name, extension, offset, size))
        except Exception:
            if samples:
                samples.popitem()  # of a sample at the damage it is not known what it lacks
            raise
        finally:
            add_samples()


def _add(shard: Path, place: str, sample: list[_Member], content: int, found: EncodedImages) -> None:
    """The image of a sample: what has no other extension than an image's, else what has one at its end. place: of its name."""
    images = [member for member in sample if member.extension != LABEL]
    images = [member for member in images if f".{member.extension}" in SUFFIXES] or images
    if len(images) > 1:
        names = " and ".join(member.name for member in images[:3])
        raise UsageError(
            f"{shard} has more than one image of a name, {names}: it is not clear which is meant, so leave one, or rename the "
            "others to NAME.WHAT.png"
        )
    if not images:
        return
    image, label = images[0], -1
    if image.offset is None:
        found.passed_over[LINK] += 1
        return
    for member in sample:
        if member.extension == LABEL and member.offset is not None and member.size <= LONGEST_LABEL:
            text = os.pread(content, member.size, member.offset).decode(errors="replace")
            number = label_from(text)
            label = -1 if number is None else number
    found.add(f"{place}/{image.name}", label, image.offset, image.size)


def _members(shard: Path) -> Iterator[tuple[str, int | None, int] | None]:
    """Name, offset and size of each file, None for the offset of a link; None alone between archives that were put one behind
    the other, as by `cat`; then ValueError where the tar ends early."""
    with open(shard, "rb") as file:
        content, end, at = file.fileno(), shard.stat().st_size, 0
        while True:
            file.seek(at)
            with tarfile.open(shard, "r:", file, encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps all, at a kilobyte each
                    if member.size < 0 or member.offset_data + member.size > end:
                        raise ValueError("it ends early")
                    if member.isfile() and not member.issparse():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        yield member.name, None, 0
                last = tar.offset
            if last >= end:
                raise ValueError("it has no end, so some of it may be missing")
            at = behind_zeros(content, last)
            if at == end:
                return
            if at - last < 2 * BLOCK:  # at what is no header, tarfile ends as at the end, which is two blocks of zeros
                raise ValueError(f"it is damaged, or something else follows it, from byte {at} on")
            yield None
