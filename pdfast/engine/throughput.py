"""Loss and throughput meters, gathered on the device and read by the host at log steps: losses by step index, skipped updates,
rates."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdfast.engine.world import World

BUCKETS = 8  # of step indices, or of diffusion times
PEAK_SIZE = {"cuda": 8192, "cpu": 512}
LEAST_RUNS = 20  # of which the fastest counts: a machine may be busy with something else


class Losses:
    """Sums of the losses since they were read last; what is not finite is counted elsewhere and left out."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=world.device)  # of losses, of ones
        self._bucket = torch.arange(BUCKETS, device=world.device)
        self._bad = torch.zeros((), dtype=torch.int64, device=world.device)

    def add(self, losses: Tensor, k: Tensor, count: Tensor) -> None:
        """losses [n] of samples with rows k [n] in 1..count, of a step table or of times."""
        finite = torch.isfinite(losses)
        member = ((k - 1) * BUCKETS // count)[:, None] == self._bucket
        member = (member & finite[:, None]).double()
        values = torch.where(finite, losses, 0).double()
        self._sums.add_(torch.stack([values @ member, member.sum(0)]))
        worst = k.index_select(0, finite.int().argmin()[None])[0]  # an index of no dimension would wait for the device
        self._bad.copy_(torch.where(finite.all(), self._bad, worst))

    def read(self) -> tuple[float, list[float | None]]:
        """Return the mean loss on all processes, and that of each bucket (None where there was none); forgets them. The host
        waits for the device."""
        sums, counts = self._world.sum(self._sums).tolist()
        self._sums.zero_()
        total = sum(counts)
        by_step = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        return sum(sums) / total if total else float("nan"), by_step

    def state(self) -> dict[str, Tensor]:
        """Return what was added since the last reading, on all processes, which all must call it: what a checkpoint holds."""
        return {"losses": self._world.sum(self._sums)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; nothing where an older version wrote none."""
        if "losses" in tensors and self._world.is_rank0:  # the sum is that of all processes
            self._sums.copy_(tensors["losses"])
        else:
            self._sums.zero_()

    @property
    def bad_step_index(self) -> int:
        """The step index of the last sample of this process whose loss was not finite; 0 if there was none."""
        return int(self._bad)


@dataclass
class Speed:
    """Rates between two readings, over all processes."""

    batch_size: int
    evaluations_per_image: float
    """Forwards of a network for each image."""
    flops_per_image: float
    """Of an update, the forwards and the backward."""
    peak_flops: float
    """Of all devices, a second."""
    began: float = 0.0
    update: int = 0
    waited: float = 0.0

    def start(self, update: int, waited: float) -> None:
        """Begin to count at an update."""
        self.began, self.update, self.waited = time.perf_counter(), update, waited

    def read(self, update: int, waited: float) -> dict[str, float]:
        """Of the updates since the last reading. waited: seconds of data wait, in all."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        count = update - self.update
        images = count * self.batch_size / seconds
        rates = {
            "images_per_second": round(images, 1),
            "update_seconds": seconds / max(count, 1),
            "data_wait": round((waited - self.waited) / seconds, 4),
            "network_evaluations_per_second": round(images * self.evaluations_per_image, 1),
            "model_flop_utilisation": round(images * self.flops_per_image / self.peak_flops, 4),
        }
        self.start(update, waited)
        return rates


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory that this process had at a time: the allocator's on a GPU, all of it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Floating-point operations a second of the device's largest matrix products in that dtype, measured."""
    size = PEAK_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> float:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        times.append(run())
    return 2 * size**3 / min(times)
