"""Indices of tar shards, as DALI's wds2idx writes them: where each member lies, so that the shard need not be read through."""

import os
import re
import tarfile
from pathlib import Path

from pdfast.data.formats.names import hidden, sample_of

MEMBER = {"v1.1": r"(\S+) (\d{1,18}) (\d{1,18})", "v1.2": r"(\S+) (\d{1,18}) (\d{1,18}) (\S+)"}
"""By the version in the first line: a member's extension, offset, size and, lately, name."""
BLOCK = 512  # bytes, of which a header takes one
DESCRIBING = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
"""Types of what describes the member behind it."""
CHUNK = 1 << 20  # bytes of zeros that are read at a time
LONGEST_NAME = 100  # characters in a header; what is longer stands before it


class Unfit(Exception):
    """An index that is not of its tar, and why."""


def indexed(shard: Path, index: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of each member that an index lists. Unfit where the shard has others.

    What follows a member must be the next that is listed: then the sizes alone show that all stand where the index says.
    Only what lies between (folders, hidden files), the first and the last are looked at, or all where it has no names.
    """
    members, listed = [], _lines(index)
    with open(shard, "rb") as file:
        content, end, at = file.fileno(), os.fstat(file.fileno()).st_size, 0
        for i, (name, offset, size) in enumerate(listed):
            before, at = at, _behind_others(content, at, offset - BLOCK)
            if at != offset - BLOCK or offset + size > end:
                raise Unfit(f"there is no member of {size} bytes at {offset}")
            if name is None and at != before:
                raise Unfit("it has no names, and the shard more than files")
            if name is None or i in (0, len(listed) - 1):
                header = _header(content, at)
                name = header.name if name is None else name
                if not (header.isreg() and header.size == size and (name == header.name or len(name) > LONGEST_NAME)):
                    raise Unfit(f"there is another member at {offset}: {header.name!r}")
            members.append((name, offset, size))
            at = offset + _blocks(size)
        _behind_others(content, at, end)
    return members


def _lines(index: Path) -> list[tuple[str | None, int, int]]:
    first, *lines = index.read_bytes().decode(errors="surrogateescape").split("\n")
    version, _, count = first.strip().partition(" ")
    lines = [line for line in lines if line]
    if not (first or lines):
        raise Unfit("it is empty")
    if version not in MEMBER or count != str(len(lines)):
        raise Unfit(f"its first line is not {' or '.join(MEMBER)} and the number of lines")
    member = MEMBER[version]
    members = []
    for line in lines:
        if not re.fullmatch(f"{member}( {member})*", line) or "\\" in line:
            raise Unfit(f"of a name with a blank or \\, or for another reason, this is not understood: {line[:60]!r}")
        samples: set[tuple[str, str] | None] = set()
        for extension, offset, size, *name in re.findall(member, line):
            members.append((name[0] if name else None, int(offset), int(size)))
            for sample, its_extension in map(sample_of, name):
                samples.add(sample if its_extension == extension else None)
        if len(samples) > 1 or None in samples:
            raise Unfit(f"these are not the members of one sample: {line[:60]!r}")
    return members


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(content: int, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(os.pread(content, BLOCK, at), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise Unfit(f"no member begins at {at}") from None


def behind_zeros(content: int, at: int) -> int:
    """Return the first block from `at` on that is not zeros, or the end of the file."""
    while chunk := os.pread(content, CHUNK, at):
        if rest := chunk.lstrip(b"\0"):
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += len(chunk)
    return at


def _behind_others(content: int, at: int, until: int) -> int:
    """Return where what an index does not list ends: folders, what is hidden and what describes; or the tar, by zeros. Unfit
    where another tar follows that."""
    while at < until:
        if not os.pread(content, BLOCK, at).strip(b"\0"):
            if behind_zeros(content, at) < os.fstat(content).st_size:
                raise Unfit("the shard is several tars, one behind the other")
            break
        header = _header(content, at)
        if not (header.isdir() or header.type in DESCRIBING or hidden(header.name)):
            raise Unfit(f"it does not list {header.name!r}")
        at += BLOCK + (0 if header.isdir() else _blocks(max(header.size, 0)))
    return at
