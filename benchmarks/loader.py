"""`python -m benchmarks.loader --data PATH`: how fast images in files become batches, next to other loaders.

A row is a loader on the same files: pdfast's three, webdataset (which reads tars), and a plain DataLoader, as it stands in
most training scripts: a Dataset that opens each file with Pillow, shuffled, collated. `images/s` is of the wall clock;
`CPU us` is the processor time an image took, of this process and its children, and `images/s a core` its inverse: what to
compare where cores are few. `first s` is the time to the first batch; for `resident` all is decoded before it. Then a real
training step, of a small U-Net at the images' size, with each of pdfast's loaders: the share of its time that is spent
waiting for data, and its rate as a share of that of a loop whose data are already there.
"""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.arguments import Parser
from benchmarks.header import header
from benchmarks.providers import Unavailable
from pdfast.data import ImageSource, LoaderName, load_source
from pdfast.data.encoded import EncodedImages
from pdfast.data.files import spare_cores
from pdfast.data.formats import SHARDS, find_images
from pdfast.data.pictures import decode
from pdfast.diffusion import Cosine
from pdfast.engine.device import open_device
from pdfast.engine.step import Draws, teacher_gradient
from pdfast.engine.world import World
from pdfast.errors import UsageError
from pdfast.networks import NetworkConfig, UNet

OURS = tuple(name for name in get_args(LoaderName) if name != "auto")
OTHERS = ("webdataset", "dataloader")
SEED = 0

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.loader", description="Images/s of loaders, and the data wait of a training step.")
    parser.add_argument("--data", required=True, metavar="PATH", help="what --data of pdfast.distill takes, in files")
    parser.add_argument("--image-size", type=int, default=64, metavar="N")
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--loaders", nargs="+", choices=[*OURS, *OTHERS], default=[*OURS, *OTHERS])
    parser.add_argument("--workers", type=int, metavar="N", help="processes of webdataset and dataloader")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row, and each training step")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    parser.check_writable(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU: say --device cpu")
    options.workers = max(spare_cores(), 0) if options.workers is None else options.workers
    options.device = open_device(options.device or "auto")
    try:
        encoded = find_images(Path(options.data))
    except UsageError as error:
        parser.error(str(error))
    if encoded is None:
        parser.error(f"{options.data} holds no encoded images: give a folder or a file of them")
    said = header(options.device) | {"data": Path(options.data).name, "images": len(encoded), "kind": encoded.kind}
    said |= {"image_size": options.image_size, "batch": options.batch, "mean_bytes": int(encoded.places[:, 2].mean())}
    print(", ".join(f"{key} {value}" for key, value in said.items()))
    rows = []
    for name in options.loaders:
        row: Row = {"loader": name}
        try:
            row |= _drawing(lambda name=name: _batches(name, encoded, options), options)
            if name in OURS:
                row |= _training(_source(name, options), options)
        except (Unavailable, UsageError) as reason:
            row["unavailable"] = str(reason)
        rows.append(row)
        _print(row)
        if options.json:
            lines = ",\n".join(json.dumps(row) for row in rows)
            options.json.write_text(f'{{"header": {json.dumps(said)}, "rows": [\n{lines}\n]}}\n')
    _summary({row["loader"]: row for row in rows if "unavailable" not in row})
    return 0


def _source(name: str, options: Namespace) -> ImageSource:
    return load_source(options.data, image_size=options.image_size, channels=3, device=options.device, loader=name)


def _batches(name: str, encoded: EncodedImages, options: Namespace) -> Iterator[object]:
    if name == "webdataset":
        return _webdataset(encoded, options)
    if name == "dataloader":
        loading = {"shuffle": True, "num_workers": options.workers, "batch_size": options.batch, "drop_last": True}
        return _without_end(DataLoader(_Plain(encoded, options.image_size), **loading))
    return _source(name, options).stream(torch.arange(options.batch), options.batch, 0, SEED)


class _Plain(Dataset):
    """A data set as it stands in most training scripts."""

    def __init__(self, encoded: EncodedImages, size: int) -> None:
        self._encoded, self._size = encoded, size

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(np.array(decode(self._encoded.read(i), self._size, 3)))


def _webdataset(encoded: EncodedImages, options: Namespace) -> Iterator[object]:
    try:
        import webdataset
    except ImportError as error:
        raise Unavailable(f"webdataset is not installed ({error})") from None
    if encoded.kind != SHARDS:
        raise Unavailable(f"webdataset reads tar shards, these are {encoded.kind}")

    def image(sample: dict[str, Any]) -> torch.Tensor:
        content = next(value for key, value in sample.items() if key in ("jpg", "jpeg", "png", "webp"))
        return torch.from_numpy(np.array(decode(content, options.image_size, 3)))

    shards = webdataset.WebDataset([str(f) for f in encoded.files], shardshuffle=False, empty_check=False)
    samples = shards.shuffle(1000).map(image).batched(options.batch, partial=False, collation_fn=torch.stack)
    return _without_end(DataLoader(samples, batch_size=None, num_workers=min(options.workers, len(encoded.files))))


def _without_end(loader: DataLoader) -> Iterator[object]:
    while True:
        yield from loader


def _cpu_seconds() -> float:
    """Of this process and its children, living ones too."""
    total = sum(os.times()[:4])
    me, tick = str(os.getpid()), os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[1] == me:
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def _drawing(batches: Callable[[], Iterator[object]], options: Namespace) -> Row:
    began = time.perf_counter()
    stream = batches()
    next(stream)
    first = time.perf_counter() - began
    count, start, cpu = 0, time.perf_counter(), _cpu_seconds()
    while time.perf_counter() < start + options.seconds:
        next(stream)
        count += options.batch
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    return {"first_s": first, "images_per_second": count / seconds, "cpu_us": 1e6 * cpu / count}


def _training(source: ImageSource, options: Namespace) -> Row:
    """Of a small U-Net at the images' size: the share of the time that is spent in waiting, and the rate next to that of the
    same loop whose batch stays."""
    levels = max(options.image_size.bit_length() - 3, 1)
    network = NetworkConfig(
        image_size=options.image_size,
        image_channels=3,
        channels=8,
        channel_mult=(1,) * levels,
        num_res_blocks=1,
        attention_resolutions=(),
        head_dim=8,
        emb_channels=32,
        num_groups=2,
        prediction="v",
    )
    model, schedule = UNet(network).to(options.device), Cosine()
    draws = Draws(source, World(options.device), seed=SEED, batch_size=options.batch, flip=True, conditional=False)
    draws.load(0, 0)
    shares, rates, update = [], {True: [], False: []}, 0
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(shares) < 3:
        for loading in (True, False):  # by turns, for what else the machine does
            waited, began = draws.waited, time.perf_counter()
            if loading:
                update += 1
                draws.load(0, update)
            float(teacher_gradient(model, draws, schedule, "truncated_snr").mean())
            seconds = time.perf_counter() - began
            rates[loading].append(options.batch / seconds)
            if loading:
                shares.append((draws.waited - waited) / seconds)
    fed, still = (float(np.median(rates[loading])) for loading in (True, False))
    return {"data_wait": float(np.median(shares)), "trained_images_per_second": fed, "of_no_data": fed / still}


def _print(row: Row) -> None:
    if "unavailable" in row:
        print(f"{row['loader']:<12} unavailable: {row['unavailable']}", flush=True)
        return
    text = f"{row['loader']:<12} {row['images_per_second']:10.0f} images/s {row['cpu_us']:9.1f} CPU us an image"
    text += f" {1e6 / row['cpu_us']:10.0f} images/s a core   first batch after {row['first_s']:.1f} s"
    if "data_wait" in row:
        text += f"; training waits {row['data_wait']:.1%}, {row['of_no_data']:.1%} of the rate without data"
    print(text, flush=True)


def _summary(rows: dict[str, Row]) -> None:
    if {"dali", "portable"} <= rows.keys():
        ratio = rows["portable"]["cpu_us"] / rows["dali"]["cpu_us"]
        print(f"dali: {ratio:.2f}x the images/s a core of portable")


if __name__ == "__main__":
    sys.exit(main())
