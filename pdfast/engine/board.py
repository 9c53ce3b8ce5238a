"""TensorBoard's events of a run, written at once: TensorBoard's own writer has a thread, which a full disk ends with a
traceback."""

import os
import socket
import time
import warnings
from pathlib import Path
from typing import IO, Any


class Board:
    """A file of events in a folder. Where it cannot be written, one warning says so, and the run goes on without."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder, self._event = folder, Event
        self._file: IO[bytes] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(folder / name, "ab")
        except OSError as error:
            self._give_up(error)
            return
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(summary=scalar(tag, value), step=step)

    def images(self, tag: str, images: Any, step: int) -> None:
        """images: uint8 [n, H, W, C]."""
        from torch.utils.tensorboard.summary import image

        self._write(summary=image(tag, images, dataformats="NHWC"), step=step)

    def _write(self, **content: Any) -> None:
        if self._file is None:
            return
        try:
            self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._file = None
        warnings.warn(
            f"TensorBoard's events cannot be written in {self._folder} ({error.strerror or error}): the run goes on without",
            stacklevel=2,
        )

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # what could not be written before cannot be written now
