"""Files that are kept between evaluations: what can be computed again at any time."""

import os
import uuid
import warnings
from pathlib import Path

from pdfast.io.errors import RunError, UsageError
from pdfast.io.files import write_file


def cache_folder() -> Path:
    """Return where they are: $PDFAST_CACHE, or ~/.cache/pdfast."""
    return Path(os.path.expanduser(os.environ.get("PDFAST_CACHE") or "~/.cache/pdfast"))


def keep(file: Path, content: bytes, what: str) -> None:
    """Write a file there, whole or not at all. Where that fails a warning says so, and what was lost: nothing but time."""
    # Another process may be writing the same.
    own = file.with_suffix(f".{uuid.uuid4().hex}")
    try:
        write_file(own, content)
        os.replace(own, file)
    except (UsageError, RunError, OSError):
        for rest in own.parent.glob(f"*{own.name}*"):
            rest.unlink(missing_ok=True)
        warnings.warn(f"{what} could not be kept in {file.parent}: set PDFAST_CACHE to another folder", stacklevel=3)
