"""Encoded images of any kind, decoded at one size and written as an array or as tar shards.

In parallel and a part at a time: a conversion that was stopped goes on with the parts that are missing, or of other images.
"""

import hashlib
import io
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pdfast.data.encoded import EncodedImages
from pdfast.data.files import Samples
from pdfast.data.identity import contents
from pdfast.data.pictures import BadImage, decode
from pdfast.data.split import channel_histogram, moments
from pdfast.io.errors import Interrupted, UsageError
from pdfast.io.files import write_file, write_folder, write_json, writing, writing_file
from pdfast.io.reading import read_json

FORMAT = 2  # of the parts
PART = 1024  # images
PROGRESS_FILE = "facts.json"
SHOWN = 64
REMEDY = "choose another OUT"


@dataclass(frozen=True)
class ConvertedImages:
    """images written, of `classes` (0 without labels); mean and std of the channels, 0 to 1; the names of bad images, which
    were left out, and why; the first images, uint8 [n, S, S, C]."""

    images: int
    classes: int
    mean: np.ndarray
    std: np.ndarray
    bad: dict[str, str]
    shown: np.ndarray


def convert(
    encoded: EncodedImages, out: Path, size: int, channels: int, *, jobs: int, max_bad: float
) -> ConvertedImages:
    """Write OUT.npz, or else a folder of tar shards of PNG files and `cls` members.

    UsageError where more than the fraction `max_bad` is bad; Interrupted on Ctrl-C, after which the same call goes on.
    """
    parts = out.with_name(f".{out.name}.parts")
    as_array = out.suffix == ".npz"
    with writing(out, REMEDY):
        _begin(parts, f"{FORMAT} {len(encoded)} {size} {channels} {as_array} {PART}")
    starts = range(0, len(encoded), PART)
    bar = tqdm(total=len(starts), unit=f"x{PART} images", disable=None)
    classes = 0 if encoded.labels is None else int(encoded.labels.max()) + 1
    samples = Samples(encoded, size, channels, classes)
    try:
        with ProcessPoolExecutor(jobs, initializer=_start, initargs=(samples, parts, as_array)) as pool:
            futures = [pool.submit(_convert_part, i) for i in range(len(starts))]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on with what is missing") from None
    finally:
        bar.close()
    facts = [read_json(parts / f"{i:06}" / PROGRESS_FILE) for i in range(len(starts))]
    bad = {name: reason for fact in facts for name, reason in fact["bad"].items()}
    if len(bad) > max_bad * len(encoded):
        name, reason = next(iter(bad.items()))
        raise UsageError(
            f"{len(bad)} of {len(encoded)} images cannot be used, more than --max-bad {max_bad:g} allows; the first: {name} "
            f"({reason}): remove or mend them, or allow more, for which what is converted stays in {parts}"
        )
    if len(bad) == len(encoded):
        shutil.rmtree(parts)
        raise UsageError(f"none of {len(encoded)} images can be used")
    arrays = (np.load(parts / f"{i:06}" / "shown.npy") for i in range(len(starts)))
    shown = next(array for array in arrays if len(array))
    with writing(out, REMEDY):
        _join(parts, len(starts), out, labelled=encoded.labels is not None)
        shutil.rmtree(parts)
    mean, std = moments(np.sum([fact["histogram"] for fact in facts], axis=0))
    return ConvertedImages(len(encoded) - len(bad), classes, mean, std, bad, shown)


def _begin(parts: Path, key: str) -> None:
    """Go on in `parts` where they are of this conversion, else from nothing."""
    file = parts / "key"
    if not file.exists() or file.read_text() != key:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_file(file, key)


_work: tuple[Samples, Path, bool]


def _start(samples: Samples, parts: Path, as_array: bool) -> None:
    global _work
    _work = samples, parts, as_array
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops all


def _convert_part(part: int) -> None:
    """Decode a part, unless that was done of the same bytes and labels."""
    samples, parts, as_array = _work
    encoded, size = samples.encoded, samples.size
    images, numbers, bad = [], [], {}
    wanted, folder = list(range(part * PART, min((part + 1) * PART, len(encoded)))), parts / f"{part:06}"
    digest = hashlib.sha256(contents(encoded, wanted))
    if encoded.labels is not None:
        digest.update(encoded.labels[wanted].tobytes())
    if folder.exists():
        if read_json(folder / PROGRESS_FILE).get("sha256") == digest.hexdigest():
            return
        shutil.rmtree(folder)
    for i in wanted:
        try:
            images.append(decode(samples.content(i), size, samples.channels))
            numbers.append(i)
        except BadImage as error:
            bad[encoded.names[i]] = str(error)
    array = np.stack(images) if images else np.empty((0, *samples.shape), dtype=np.uint8)
    labels = np.zeros(len(numbers), dtype=np.int64) if encoded.labels is None else encoded.labels[numbers]

    def fill(folder: Path) -> None:
        if as_array:
            np.save(folder / "images.npy", array)
            np.save(folder / "labels.npy", labels)
        else:
            _write_shard(folder / "shard.tar", array, numbers, None if encoded.labels is None else labels)
        np.save(folder / "shown.npy", array[:SHOWN])
        histogram = channel_histogram(array).tolist()
        write_json(folder / PROGRESS_FILE, {"sha256": digest.hexdigest(), "histogram": histogram, "bad": bad})

    write_folder(folder, fill, REMEDY)


def _write_shard(path: Path, images: np.ndarray, numbers: list[int], labels: np.ndarray | None) -> None:
    """WebDataset: NUMBER.png and NUMBER.cls; the same bytes whenever it is written."""
    from PIL import Image

    def members() -> Iterator[tuple[str, bytes]]:
        for row, number in enumerate(numbers):
            content = io.BytesIO()
            Image.fromarray(images[row].squeeze(-1) if images.shape[3] == 1 else images[row]).save(content, "PNG")
            yield f"{number:09}.png", content.getvalue()
            if labels is not None:
                yield f"{number:09}.cls", str(labels[row]).encode()

    with tarfile.open(path, "w") as tar:
        for name, content in members():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _join(parts: Path, count: int, out: Path, *, labelled: bool) -> None:
    folders = [parts / f"{i:06}" for i in range(count)]
    if out.suffix != ".npz":
        whole = parts / "whole"
        whole.mkdir(exist_ok=True)
        for i, folder in enumerate(folders):
            if (folder / "shard.tar").exists():  # else it was moved before a stop
                os.rename(folder / "shard.tar", whole / f"{i:06}.tar")
        os.rename(whole, out)
        return
    arrays = {"images": np.concatenate([np.load(folder / "images.npy") for folder in folders])}
    if labelled:
        arrays["labels"] = np.concatenate([np.load(folder / "labels.npy") for folder in folders])
    write_npz(out, **arrays)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write an uncompressed .npz atomically; a full disk or a forbidden folder is one line and leaves nothing."""
    with writing_file(path, REMEDY) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
