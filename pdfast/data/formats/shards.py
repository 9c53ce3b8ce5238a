"""Files that hold many images each."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pdfast.data.encoded import EncodedImages
from pdfast.io.errors import UsageError

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def scan_shards(kind: str, shards: list[Path], scan: Callable[[Path, EncodedImages], None]) -> EncodedImages:
    """Return the images that `scan` adds of each; what ends a shard early becomes its problem. UsageError where there are
    none."""
    found = EncodedImages(kind)
    for shard in shards:
        found.files.append(shard)
        before = len(found)
        try:
            scan(shard, found)
        except (UsageError, OSError):
            raise
        except Exception as error:  # damaged data make tarfile raise almost anything
            if len(found) == before:
                _refuse_if_compressed(shard)
            reason = " ".join(str(error).split()) or type(error).__name__
            found.problems[str(shard)] = f"{reason}, after {len(found) - before} images"
    if not len(found):
        problem = next((f" ({name}: {reason})" for name, reason in found.problems.items()), "")
        raise UsageError(f"{shards[0].parent}: no images in {len(shards)} {kind}{problem}: give others")
    return found.done()


def _refuse_if_compressed(shard: Path) -> None:
    with open(shard, "rb") as file:
        start = file.read(8)
    for magic, program in MAGIC.items():
        if start.startswith(magic):
            refuse_compressed(shard, program)


def refuse_compressed(shard: Path, by: str = "as its name says") -> NoReturn:
    raise UsageError(f"{shard} is compressed ({by}), and images are read from the middle of files: decompress it first")
