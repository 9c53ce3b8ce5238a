"""Decoding with Pillow in the processes of torch's DataLoader: wherever Python runs."""

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from pdfast.data.files import Decoded, Samples, spare_cores
from pdfast.io.errors import UsageError

AHEAD = 2  # batches each process decodes before they are asked for


class _Batches(Dataset):
    """Item [indices] is their images, or what is wrong with all of them."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, indices: list[int]) -> Decoded | UsageError:
        try:
            return self._samples.decoded(indices)
        except UsageError as error:  # raised here, it would arrive with a traceback in its message
            return error


class _InOrder:
    """A sampler of what an iterator gives."""

    def __init__(self, indices: Iterator[list[int]]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices


def _as_it_is(item: Any) -> Any:
    return item


def _leave_stopping_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class PortableLoader:
    """torch's DataLoader, with a process for each core but one (with none of its own on a machine of one)."""

    name = "portable"

    def __init__(self, samples: Samples, processes: int | None = None) -> None:
        self._samples = samples
        self._processes = max(spare_cores(), 0) if processes is None else processes

    def stream(self, indices: Iterator[list[int]]) -> Iterator[Decoded]:
        loader = DataLoader(
            _Batches(self._samples),
            sampler=_InOrder(indices),
            batch_size=None,
            num_workers=self._processes,
            prefetch_factor=AHEAD if self._processes else None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_stopping_to_the_parent,
        )
        for item in loader:
            if isinstance(item, UsageError):
                raise item
            yield item
