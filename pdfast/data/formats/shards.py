"""Files that hold many images each."""

import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

from pdfast.data.encoded import EncodedImages
from pdfast.errors import UsageError


def scan_shards(kind: str, shards: list[Path], scan: Callable[[Path, EncodedImages], None]) -> EncodedImages:
    """The images that `scan` adds of each; what ends a shard early becomes its problem. UsageError where there are none."""
    found = EncodedImages(kind)
    for shard in shards:
        found.files.append(shard)
        before = len(found)
        try:
            scan(shard, found)
        except (tarfile.TarError, struct.error, ValueError, IndexError, EOFError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            found.problems[str(shard)] = f"{reason}, after {len(found) - before} images"
    if not len(found):
        problem = next((f" ({name}: {reason})" for name, reason in found.problems.items()), "")
        raise UsageError(f"{shards[0].parent}: no images in {len(shards)} {kind}{problem}: give others")
    return found.done()
