"""What `--data` names, as a source of images."""

from importlib import resources
from pathlib import Path

import torch

from pdfast.data.arrays import load_array_file
from pdfast.data.source import ImageSource, LoaderName, ResidentImages, check_labels
from pdfast.io.errors import UsageError

WHAT_DATA_MAY_BE = "give `digits`, a .npy or .npz file, or a folder or file of image files, tar shards or TFRecord"
DIGITS_SHAPE = (8, 8, 1)


def check_shape(spec: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise a UsageError unless the shape (H, W, C) of the images that --data names is the expected one, of a network."""
    if shape == expected:
        return
    do = (
        "give --data of that size, or train a network of theirs, with --network.image-size and --network.image-channels"
    )
    if shape[0] in (1, 3) and shape[2] not in (1, 3):
        do = "they seem to have their channels first, so save them as [N, H, W, C], by images.transpose(0, 2, 3, 1)"
    raise UsageError(f"{spec} has images of (height, width, channels) {shape}, the network takes {expected}: {do}")


def load_source(
    spec: str,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    device: torch.device | str = "cpu",
    num_classes: int = 0,
    loader: LoaderName = "auto",
    max_bad: float = 0.001,
) -> ImageSource:
    """Return the built-in `digits`, a .npy or .npz file of uint8 images, or encoded images in files (`./digits` if so named):
    see `pdfast.data.formats.find_images`.

    num_classes: of a network that is conditioned on them, whose labels must be below that, else 0. max_bad: the fraction of encoded images that may be bad.
    UsageError, in one line that names the path, for data that are missing, damaged, or of images that are not
    [height, width, channels], where image_size is both or (height, width).
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    path = Path(spec)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {spec} ({getattr(error, 'strerror', None) or error}): allow it, or give other data"
        ) from None
    if spec == "digits":
        with resources.as_file(resources.files("pdfast.data") / "digits.npz") as file:
            images, labels = load_array_file(file)
    elif not there:
        raise UsageError(f"there are no data at {spec}: {WHAT_DATA_MAY_BE}")
    elif path.suffix.lower() in (".npy", ".npz") and path.is_file():
        images, labels = load_array_file(path)
    else:
        from pdfast.data.loaders import open_files  # with Pillow, which arrays do without

        source = open_files(
            path,
            image_size=height if height == width else (height, width),
            channels=channels,
            device=device,
            num_classes=num_classes,
            loader=loader,
            max_bad=max_bad,
        )
        if source is not None:
            return source
        raise UsageError(f"{spec} is not data that pdfast reads: {WHAT_DATA_MAY_BE}")
    if loader not in ("auto", "resident"):
        raise UsageError(f"{spec} is an array, which is always resident: leave out --loader {loader}")
    check_shape(spec, images.shape[1:], (height, width, channels))
    numbers = None if labels is None else torch.from_numpy(labels)
    check_labels(numbers, num_classes, spec)
    return ResidentImages(path.absolute().name, torch.from_numpy(images), numbers, device)
