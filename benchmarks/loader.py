"""`python -m benchmarks.loader --data PATH`: how fast images in files become batches, next to other loaders.

A row is a loader on the same files: pdfast's three, webdataset (which reads tars), and a plain DataLoader, as it stands in
most training scripts: each file opened with Pillow, shuffled, collated. `images/s` is of the wall clock;
`CPU us` is the processor time an image took, of this process and its children, and `images/s a core` its inverse: what to
compare where cores are few. `first s` is the time to the first batch; for `resident` all is decoded before it. Then a real
training step, of a small U-Net at the images' size, with each of pdfast's loaders: the share of its time that is spent
waiting for data, and its rate as a share of that of a loop whose data are already there.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.command import Parser, Report, Row, Unavailable, count, header, trying
from pdfast.data import ImageSource, LoaderName, load_source
from pdfast.data.encoded import EncodedImages
from pdfast.data.files import spare_cores
from pdfast.data.formats import SHARDS, find_images
from pdfast.data.pictures import decode
from pdfast.diffusion import Cosine
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from pdfast.methods import Denoise
from pdfast.recipes import PRESETS

OURS = tuple(name for name in get_args(LoaderName) if name != "auto")
OTHERS = ("webdataset", "dataloader")
SEED = 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.loader", description="Images/s of loaders, and the data wait of a training step.")
    parser.add_argument("--data", required=True, metavar="PATH", help="what --data of pdfast.distill takes, in files")
    parser.add_argument("--image-size", type=count, default=64, metavar="N")
    parser.add_argument("--batch", type=count, default=128, metavar="N")
    parser.add_argument("--loaders", nargs="+", choices=[*OURS, *OTHERS], default=[*OURS, *OTHERS])
    parser.add_argument("--workers", type=int, metavar="N", help="processes of webdataset and dataloader")
    parser.add_measuring(10.0)
    options = parser.parse(arguments)
    options.workers = max(spare_cores(), 0) if options.workers is None else options.workers
    try:
        encoded = find_images(Path(options.data))
    except UsageError as error:
        parser.error(str(error))
    if encoded is None:
        parser.error(f"{options.data} holds no encoded images: give a folder or a file of them")
    said = header(options.device) | {"data": Path(options.data).name, "images": len(encoded), "kind": encoded.kind}
    said |= {"image_size": options.image_size, "batch": options.batch, "mean_bytes": int(encoded.places[:, 2].mean())}
    numbers = (
        "{images_per_second:10.0f} images/s {cpu_us:9.1f} CPU us an image {a_core:9.0f} images/s a core   first batch "
    )
    numbers += "after {first_s:.1f} s; training waits {data_wait:.1%}, {of_no_data:.1%} of the rate without data"
    report = Report(options.json, said, "{loader:<12}", numbers)
    for name in options.loaders:
        row: Row = {"loader": name}
        with trying(row):
            row |= _drawing(name, encoded, options)
            if name in OURS:
                row |= _training(_source(name, options), options)
        report.add(row)
    return 0


def _source(name: str, options: Namespace) -> ImageSource:
    return load_source(options.data, image_size=options.image_size, channels=3, device=options.device, loader=name)


def _batches(name: str, encoded: EncodedImages, options: Namespace) -> Iterator[object]:
    """The loader's batches, without an end."""
    if name in OURS:
        return _source(name, options).stream(torch.arange(options.batch), options.batch, 0, SEED)
    if name == "webdataset":
        return _webdataset(encoded, options)

    def images(indices: list[int]) -> torch.Tensor:
        return torch.stack([_tensor(encoded.read(i), options.image_size) for i in indices])

    loading = {"shuffle": True, "num_workers": options.workers, "batch_size": options.batch, "drop_last": True}
    return chain.from_iterable(repeat(DataLoader(range(len(encoded)), collate_fn=images, **loading)))


def _tensor(content: bytes, size: int) -> torch.Tensor:
    return torch.from_numpy(np.array(decode(content, size, 3)))


def _webdataset(encoded: EncodedImages, options: Namespace) -> Iterator[object]:
    try:
        import webdataset
    except ImportError as error:
        raise Unavailable(f"webdataset is not installed ({error})") from None
    if encoded.kind != SHARDS:
        raise Unavailable(f"webdataset reads tar shards, these are {encoded.kind}")

    def image(sample: dict[str, Any]) -> torch.Tensor:
        return _tensor(next(sample[key] for key in ("jpg", "jpeg", "png", "webp") if key in sample), options.image_size)

    shards = webdataset.WebDataset([str(f) for f in encoded.files], shardshuffle=False, empty_check=False)
    samples = shards.shuffle(1000).map(image).batched(options.batch, partial=False, collation_fn=torch.stack)
    processes = min(options.workers, len(encoded.files))
    return chain.from_iterable(repeat(DataLoader(samples, batch_size=None, num_workers=processes)))


def _cpu_seconds() -> float:
    """Of this process and its children, living ones too."""
    total, tick = sum(os.times()[:4]), os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[1] == str(os.getpid()):
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def _drawing(name: str, encoded: EncodedImages, options: Namespace) -> Row:
    began = time.perf_counter()
    stream = _batches(name, encoded, options)
    next(stream)
    first, start, batches, cpu = time.perf_counter() - began, time.perf_counter(), 0, _cpu_seconds()
    while time.perf_counter() < start + options.seconds:
        next(stream)
        batches += 1
    images = batches * options.batch
    rate, cpu = images / (time.perf_counter() - start), (_cpu_seconds() - cpu) / images
    return {"first_s": first, "images_per_second": rate, "a_core": 1 / cpu if cpu else None, "cpu_us": 1e6 * cpu}


def _training(source: ImageSource, options: Namespace) -> Row:
    """Of a small U-Net at the images' size: the share of the time that is spent in waiting, and the rate next to that of the
    same loop whose batch stays."""
    levels = (1,) * max(options.image_size.bit_length() - 3, 1)
    shape = {"image_size": options.image_size, "image_channels": 3, "channels": 8, "channel_mult": levels}
    network = replace(PRESETS["digits"].network, **shape, head_dim=8, emb_channels=32)
    method = Denoise(network.build().to(options.device), Cosine(), "truncated_snr")
    batch = TrainingBatch(source, World(options.device), network, seed=SEED, batch_size=options.batch, flip=True)
    shares, times, update = [], {True: [], False: []}, 0
    end = time.perf_counter() + options.seconds
    batch.load(0, update)
    while time.perf_counter() < end or len(shares) < 3:
        for loading in (True, False):  # by turns, for what else the machine does
            waited, began = batch.waited, time.perf_counter()
            update += loading
            batch.load(0, update)
            float(method.gradient(batch)[0].mean())
            times[loading].append(time.perf_counter() - began)
            shares += [(batch.waited - waited) / times[True][-1]] if loading else []
    fed, still = median(times[True]), median(times[False])
    return {"data_wait": median(shares), "trained_images_per_second": options.batch / fed, "of_no_data": still / fed}


if __name__ == "__main__":
    sys.exit(main())
