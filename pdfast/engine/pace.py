"""Whether a run has become many times slower than it was, and why: a machine that is shared says nothing of it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from pdfast.io.process import WAITING_POLICIES

WINDOW_SECONDS = 10.0
WINDOW_UPDATES = 5  # at least, so that a checkpoint or a laptop's sleep is not their median
SLOW = 3.0  # times the best window
SLOW_WINDOWS = 6  # in a row: over a minute
MUCH_WAITING = 0.5  # of the time


@dataclass(frozen=True)
class Slowness:
    times: float
    """How many times as long as in the best window an update takes."""
    data_wait: float
    """The share of the time that goes into waiting for data."""


class Pace:
    """The times of one kind of update, in windows, of which each has a median."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._best = float("inf")
        self._slow: list[Slowness] = []

    def start(self, waited: float) -> None:
        """Updates begin, or begin again after something else. waited: seconds of data wait, in all."""
        self._begin_window(self._clock(), waited)

    def _begin_window(self, now: float, waited: float) -> None:
        self._began = self._last = now
        self._waited_before = waited
        self._elapsed: list[float] = []

    def update(self, waited: float) -> Slowness | None:
        """Count an update that is done; return the mean slowness of the last minute if it has lasted as long, else None."""
        now = self._clock()
        self._elapsed.append(now - self._last)
        self._last, seconds = now, now - self._began
        if seconds < WINDOW_SECONDS or len(self._elapsed) < WINDOW_UPDATES:
            return None
        typical, data_wait = median(self._elapsed), (waited - self._waited_before) / seconds
        self._begin_window(now, waited)
        self._best = min(self._best, typical)
        self._slow.append(Slowness(typical / self._best, data_wait))
        if self._slow[-1].times <= SLOW:
            self._slow = []
        if len(self._slow) < SLOW_WINDOWS:
            return None
        slow, self._slow = self._slow, []
        return Slowness(sum(s.times for s in slow) / len(slow), sum(s.data_wait for s in slow) / len(slow))


def likely_cause(slowness: Slowness, device: torch.device) -> str:
    """In words, with what to do."""
    if slowness.data_wait > MUCH_WAITING:
        return f"{slowness.data_wait:.0%} of the time it waits for images: is the disk or its network busy?"
    cores, load = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _load()
    threads = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cpu" and threads > cores:
        return f"its {threads} threads have {cores} cores; set OMP_NUM_THREADS to less"
    if load > cores:
        policy = next((f"{name}={os.environ[name]}" for name in WAITING_POLICIES if name in os.environ), None)
        spins = f" Threads wait as {policy} says: ones that spin lose most." if policy and _spins() else ""
        return (
            f"other processes want the same cores (load average {load:.1f}, {cores} cores); end them, or wait.{spins}"
        )
    return "nothing else seems busy here; is the machine throttled or shared with others, or its memory full?"


def _spins() -> bool:
    """Tell whether the user asks OpenMP's threads to."""
    policy, count = os.environ.get("OMP_WAIT_POLICY", ""), os.environ.get("GOMP_SPINCOUNT", "0")
    return policy.lower() == "active" or not count.isdecimal() or int(count) > 100_000


def _load() -> float:
    """Of the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0
