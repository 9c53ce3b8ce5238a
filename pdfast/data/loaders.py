"""Which loader decodes images in files, and why."""

import math
import warnings
from pathlib import Path

import torch

from pdfast.data import dali
from pdfast.data.files import FileImages, Loader, Samples
from pdfast.data.formats import find_images
from pdfast.data.pictures import Size
from pdfast.data.portable import PortableLoader
from pdfast.data.source import ImageSource, LoaderName, check_labels
from pdfast.io.errors import UsageError

MOST_RESIDENT = 1 << 30  # bytes of decoded images that are kept in memory unless said otherwise


def open_files(
    path: Path,
    *,
    image_size: Size,
    channels: int,
    device: torch.device | str,
    num_classes: int,
    loader: LoaderName,
    max_bad: float,
) -> ImageSource | None:
    """Return the images of `find_images(path)`, by that loader; None where they are no encoded images. See `load_source`."""
    encoded = find_images(path)
    if encoded is None:
        return None
    name, device = path.absolute().name, torch.device(device)
    if channels not in (1, 3):
        raise UsageError(f"image files have 1 or 3 channels, the network takes {channels}: make {path} an .npz")
    check_labels(None if encoded.labels is None else torch.from_numpy(encoded.labels), num_classes, str(path))
    for shard, problem in encoded.problems.items():
        warnings.warn(f"{shard} is damaged ({problem}); the rest of it is left out", stacklevel=2)
    samples = Samples(encoded, image_size, channels, num_classes)
    lacking = dali.missing() if loader in ("auto", "dali") else None
    if loader == "dali" and lacking:
        raise UsageError(f"--loader dali: {lacking}")
    size = len(encoded) * math.prod(samples.shape)
    chosen = loader
    if loader == "auto":
        chosen = "resident" if size <= MOST_RESIDENT else "portable" if lacking else "dali"
        if chosen == "portable":
            warnings.warn(f"images are decoded by Pillow, which is slower: {lacking}", stacklevel=2)
    decoding: Loader = dali.DaliLoader(samples, device) if chosen == "dali" else PortableLoader(samples)
    source = FileImages(name, samples, decoding, max_bad, device)
    source.description += f", loader {chosen} (" + ("as asked" if loader == chosen else f"{size >> 20} MiB") + ")"
    return source.resident() if chosen == "resident" else source
