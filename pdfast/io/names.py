"""Names of files that are not UTF-8, as archives of old machines leave them on Linux: such bytes are surrogates in a `str`, which
neither consoles nor pages nor other libraries take."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return the text with \\xff for a byte of a name that is not UTF-8."""
    return text if _is_utf8(text) else os.fsencode(text).decode(errors="backslashreplace")


def shell_word(text: str) -> str:
    """Return the text as a shell reads it, in letters that any console has where it is not UTF-8."""
    if _is_utf8(text):
        return shlex.quote(text)
    plain = "".join(
        chr(b) if chr(b).isalnum() and b < 128 or b in b"/._-" else f"\\x{b:02x}" for b in os.fsencode(text)
    )
    return f"$'{plain}'"


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path that exists, within the block by another name where its own is not UTF-8, which safetensors and diffusers
    refuse."""
    if _is_utf8(os.fspath(path)):
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
