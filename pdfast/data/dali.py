"""Decoding with NVIDIA DALI: by its own threads on the CPU, or on the GPU.

DALI is fed, by number, with the encoded images of the order that all loaders share: no state of its own goes into a
checkpoint, and a run goes on at any image, on any number of processes. Pillow opens each header first. DALI decodes what
it decodes as Pillow does: JPEG and WebP, as they are stored and in colour, for its grey is another and its reader of
orientations ends the process where a file has two (2.4.0). Images are turned, and made grey, here. All else Pillow decodes.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from pdfast.data.files import Bad, Decoded, Samples, spare_cores
from pdfast.data.pictures import UPRIGHT, BadImage, decode, examine, fit, in_full, sides
from pdfast.io.errors import RunError

AHEAD = 2  # batches decoded before they are asked for
JOIN_SECONDS = 10.0
ALIKE = {"JPEG", "MPO", "WEBP"}, {"L", "RGB"}  # formats and modes that DALI and Pillow decode alike
# Of each orientation, whether the stored rows and columns run backwards, and are exchanged then.
TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
INSTALL = "pip install 'pdfast[dali]'"


def missing() -> str | None:
    """Return why there is no DALI here, or None."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"NVIDIA DALI is not installed ({error}; {INSTALL})"
    return None


class _Prepared(NamedTuple):
    """What DALI decodes, uint8 [bytes], and the square that it takes of it: its first and last corner, float32 (y, x), of which
    the last may come first; whether rows and columns are exchanged then; whether Pillow has decoded it already."""

    content: np.ndarray
    start: np.ndarray
    end: np.ndarray
    exchanged: bool
    decoded: bool


class DaliLoader:
    """DALI on a device; files are read, and headers looked at, in threads of Python."""

    name = "dali"

    def __init__(self, samples: Samples, device: torch.device, threads: int | None = None) -> None:
        self._samples, self._device = samples, device
        self._threads = max(spare_cores(), 1) if threads is None else threads
        self._bad: dict[int, str] = {}  # what Pillow cannot decode either, though its header is good
        self._for_pillow: set[int] = set()  # what DALI alone cannot decode

    def stream(self, indices: Iterator[list[int]]) -> Iterator[Decoded]:
        return _Ahead(self._batches(indices))

    def _batches(self, indices: Iterator[list[int]]) -> Iterator[Decoded]:
        pipeline = None
        with ThreadPoolExecutor(self._threads) as pool:
            for wanted in indices:
                images = None
                while images is None:
                    items = list(pool.map(self._prepared, wanted))
                    pipeline = pipeline or self._pipeline(len(wanted))
                    try:
                        images = self._run(pipeline, [prepared for prepared, _, _ in items])
                    except RuntimeError as error:
                        # One image that cannot be decoded ends a pipeline, which does not say which it was.
                        pipeline = None
                        self._find_culprits([(i, prepared) for prepared, i, _ in items], error)
                chosen, bad = [i for _, i, _ in items], [one for _, _, passed in items for one in passed]
                yield Decoded(images, torch.tensor(chosen), bad)

    def _prepared(self, i: int) -> tuple[_Prepared, int, list[Bad]]:
        return self._samples.usable(i, self._prepare)

    def _prepare(self, i: int, content: bytes) -> _Prepared:
        if i in self._bad:
            raise BadImage(self._bad[i])
        opened = examine(content)
        formats, modes = ALIKE
        alike = opened.image.format in formats and opened.image.mode in modes and not opened.transparent
        tall, wide = sides(self._samples.size)
        *backwards, exchanged = TURNS[opened.orientation]
        # A batch has one size, which an image that lies on its side would have exchanged.
        decoded = i in self._for_pillow or not alike or (exchanged and tall != wide)
        if decoded:
            content = _as_pnm(in_full(opened, self._samples.channels))
        to = fit(opened.width, opened.height, self._samples.size)
        stored, scale = (opened.height, opened.width), (opened.height / to.height, opened.width / to.width)
        first = scale[0] * to.upper, scale[1] * to.left
        last = scale[0] * (to.upper + tall), scale[1] * (to.left + wide)
        if decoded:
            *backwards, exchanged = TURNS[UPRIGHT]
        corners = np.array([first, last], dtype=np.float32)
        if exchanged:
            corners, stored = corners[:, ::-1], stored[::-1]
        start, end = np.where(backwards, np.array(stored, dtype=np.float32) - corners, corners)
        return _Prepared(np.frombuffer(content, dtype=np.uint8), start, end, exchanged, decoded)

    def _pipeline(self, batch_size: int):
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
            corners = [fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end")]
            how = {"output_type": types.RGB, "adjust_orientation": False}
            image = fn.decoders.image(content, device="mixed" if on_gpu else "cpu", **how)
            if self._samples.channels == 1:
                image = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
            square = {"size": sides(self._samples.size), "roi_start": corners[0], "roi_end": corners[1]}
            pipeline.set_outputs(fn.resize(image, **square, interp_type=types.INTERP_CUBIC, antialias=True))
        pipeline.build()
        return pipeline

    def _run(self, pipeline, items: list[_Prepared]) -> Tensor:
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

        pipeline.feed_input("content", [item.content for item in items])
        pipeline.feed_input("start", [item.start for item in items])
        pipeline.feed_input("end", [item.end for item in items])
        (images,) = pipeline.run()
        squares = to_torch_tensor(images.as_tensor(), copy=True)
        exchanged = torch.tensor([item.exchanged for item in items])
        if exchanged.any():
            exchanged = exchanged.to(squares.device)
            squares[exchanged] = squares[exchanged].transpose(1, 2)
        return squares

    def _find_culprits(self, items: list[tuple[int, _Prepared]], error: RuntimeError) -> None:
        """Which of these ended the pipeline: it is bad if Pillow cannot decode it either, else Pillow decodes it from now on.
        RunError where there is none."""
        found = False
        for i, prepared in items:
            if prepared.decoded:
                continue
            try:
                decode(prepared.content.tobytes(), self._samples.size, self._samples.channels)
            except BadImage as reason:
                self._bad[i], found = str(reason), True
                continue
            try:
                self._run(self._pipeline(1), [prepared])
            except RuntimeError:
                self._for_pillow.add(i)
                found = True
        if not found:
            raise RunError(f"DALI failed, of no image in particular ({_one_line(error)}): say --loader portable")


def _one_line(error: RuntimeError) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")


def _as_pnm(image: Image) -> bytes:
    """Return the pixels behind a header that DALI reads."""
    kind = 5 if image.mode == "L" else 6
    return b"P%d\n%d %d\n255\n" % (kind, image.width, image.height) + image.tobytes()


class _Ahead:
    """What an iterator gives, made in a thread, a few items before they are asked for."""

    def __init__(self, items: Iterator[Decoded]) -> None:
        self._ready: queue.Queue = queue.Queue(AHEAD)
        stopped = threading.Event()
        thread = threading.Thread(target=_fill, args=(items, self._ready, stopped), daemon=True)
        thread.start()
        weakref.finalize(self, _stop, stopped, thread)

    def __iter__(self) -> "Iterator[Decoded]":
        return self

    def __next__(self) -> Decoded:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item


def _fill(items: Iterator[Decoded], ready: queue.Queue, stopped: threading.Event) -> None:
    def put(item: Decoded | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    try:
        for item in items:
            put(item)
            if stopped.is_set():
                return
    except BaseException as error:  # raised where the item is asked for
        put(error)


def _stop(stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    if thread is not threading.current_thread():  # which may collect the garbage of others
        thread.join(JOIN_SECONDS)
