"""Files that are there whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from pdfast.io.errors import RunError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
_REMEDY = ContextVar("_REMEDY", default="choose another folder with --run")
"""What to do where a place cannot be written: what the outermost `writing` says holds for all that is written within."""
SEAL = "checksum"
"""The field of a JSON file that holds the hash of all others."""


@contextmanager
def writing(path: Path, remedy: str | None = None) -> Iterator[None]:
    """Turn an OSError while writing `path` into one line: RunError for a full disk, UsageError for a forbidden folder.

    remedy: what to do about the latter; by default what the block around this one says, else to choose another --run.
    Other libraries report a full disk in exceptions of their own, so the errno is looked for in the message as well.
    """
    before = _REMEDY.set(remedy or _REMEDY.get())
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        text = str(error)
        if number in _FULL or "os error 28" in text or "os error 27" in text:
            raise RunError(
                f"the disk is full: could not write {path}; what was saved before is kept, "
                "free some space and run the same command again"
            ) from None
        if number in _FORBIDDEN or "os error 13" in text or "os error 30" in text:
            raise UsageError(f"cannot write {path} ({os.strerror(number or errno.EACCES)}); {_REMEDY.get()}") from None
        if isinstance(error, OSError):
            raise RunError(
                f"could not write {path}: {error.strerror or error}; what was saved before is kept"
            ) from None
        raise
    finally:
        _REMEDY.reset(before)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def check_folder(path: Path, remedy: str | None = None) -> None:
    """Raise a UsageError, before any work, where the folder `path` cannot be made or written to; RunError for a full disk. It
    is tried in a temporary folder in the deepest part of the path that exists."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    with writing(path, remedy):
        try:
            with TemporaryDirectory(prefix=".pdfast-", dir=there) as tried:
                if there != path:
                    (tried / _temporary(path).relative_to(there)).mkdir(parents=True)
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise UsageError(f"cannot write {path} ({error.strerror}); {_REMEDY.get()}") from None


def check_file(path: Path, remedy: str) -> None:
    """Raise a UsageError, before any work, where the file `path` cannot be written; RunError for a full disk."""
    if not os.path.lexists(path):
        check_folder(path, remedy)
    elif path.is_dir() or path.is_socket():
        raise UsageError(f"cannot write {path} (it is a {'folder' if path.is_dir() else 'socket'}); {remedy}")
    elif _appears(path):
        check_folder(path.parent, remedy)


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _appears(path: Path) -> bool:
    """Tell whether a file that is written appears by a rename; what is no plain file, such as a link, a pipe or a device, is
    written to and not replaced."""
    return not path.is_symlink() and (path.is_file() or not path.exists())


@contextmanager
def writing_file(path: Path, remedy: str | None = None) -> Iterator[BinaryIO]:
    """Open a file that is written atomically: readers see the old content or, after the block, the new. What is no plain file,
    such as a link, a pipe or a device, is written to and not replaced."""
    temporary = _temporary(path)
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _appears(path):
            with open(path, "wb") as file:
                yield file
            return
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_file(path: Path, content: bytes | str, remedy: str | None = None) -> None:
    """Write a file as `writing_file` does."""
    with writing_file(path, remedy) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, remedy: str | None = None) -> None:
    """Write JSON as `write_file` does."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n", remedy)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return plain data with the hash of what it says, by which `check_seal` sees that something was changed."""
    return value | {SEAL: _hash_of(value)}


def check_seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return the plain data without its seal; older data have none. ValueError where they say something else than what was
    sealed."""
    rest = {name: content for name, content in value.items() if name != SEAL}
    if SEAL in value and value[SEAL] != _hash_of(rest):
        raise ValueError(f"its {SEAL} differs")
    return rest


def _hash_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_folder(path: Path, fill: Callable[[Path], None], remedy: str | None = None) -> None:
    """Create the folder `path` atomically: `fill` writes into a temporary one, which is synced and renamed."""
    temporary = _temporary(path)
    with writing(path, remedy):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            commit_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def commit_folder(temporary: Path, path: Path) -> None:
    """Sync a folder and what is in it, then let it appear as `path`, by one rename.

    Files get the permissions that the umask leaves, as the folder did: some writers keep theirs to their owner.
    """
    with writing(path):
        permissions = temporary.stat().st_mode & 0o666
        for file in sorted(temporary.rglob("*"), reverse=True):  # what is in a folder before the folder
            if file.is_file() and file.stat().st_mode & 0o777 != permissions:
                file.chmod(permissions)
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)


def sha256(path: Path) -> str:
    """Return hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
