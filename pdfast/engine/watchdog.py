"""Ends a run of several processes in which one hangs, and says which: the others would wait for it for hours.

Each process has a thread that writes into the store of the process group, every second, how far its process is and where
in the code. A process whose main thread gets no further for too long reads what the others wrote: one that writes no
more is dead or stopped; otherwise all places are named.
"""

import os
import sys
import threading
import time
from pathlib import Path

from pdfast.engine.world import World, open_store

EVERY = 1.0  # seconds between two signs of life
SILENT = 5.0  # seconds in which another process's sign of life must change
FIRST = 10  # times the patience, where something begins that compiles
HUNG = 1  # exit code
_PACKAGE = str(Path(__file__).parents[1])


class Watchdog:
    """Watches the processes of a world from the `with` on; one process alone is not watched."""

    def __init__(self, world: World, patience: float) -> None:
        """patience: seconds without progress after which the run ends; ten times as many before the first."""
        self._world, self._patience = world, patience
        self._done, self._place, self._moved = 0, "the start", time.monotonic()
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._world.size > 1:
            self._store = open_store("watchdog")
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._thread:
            self._thread.join()

    def begin(self) -> None:
        """Something begins that compiles first: have more patience until the next `beat`."""
        self._done, self._moved = 0, time.monotonic()

    def beat(self, place: str) -> None:
        """The main thread has got as far as `place`."""
        self._done, self._place, self._moved = self._done + 1, place, time.monotonic()

    def _watch(self) -> None:
        signs = 0
        while not self._stopped.wait(EVERY):
            signs += 1
            try:
                self._store.set(str(self._world.rank), f"{signs} {self._place}, in {self._where()}")
            except RuntimeError:
                pass  # whose process keeps the store has gone or hangs: then the time-out must do
            idle = time.monotonic() - self._moved
            if idle > self._patience * (1 if self._done else FIRST):
                self._end(idle)

    def _where(self) -> str:
        """Return the innermost place of our code that the main thread is in."""
        frame = sys._current_frames().get(self._main)
        while frame and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "the interpreter"

    def _signs(self) -> list[str]:
        """Return what each process wrote last; "0 nowhere" where it has not yet. RuntimeError where the store does not
        answer."""
        keys = [str(rank) for rank in range(self._world.size)]
        return [self._store.get(key).decode() if self._store.check([key]) else "0 nowhere" for key in keys]

    def _end(self, idle: float) -> None:
        try:
            message = self._blame(idle)
        except RuntimeError as error:
            message = f"no update for {idle:.0f} s, and the process that keeps the store does not answer ({error})"
        print(f"pdfast: error: rank {self._world.rank}: {message}", file=sys.stderr, flush=True)
        os._exit(HUNG)

    def _blame(self, idle: float) -> str:
        before = self._signs()
        time.sleep(SILENT)
        after = self._signs()
        hung = [rank for rank, (a, b) in enumerate(zip(before, after, strict=True)) if a == b]
        hung = [rank for rank in hung if rank != self._world.rank]
        if hung:
            named = ", ".join(f"rank {rank} (last seen at {after[rank].split(' ', 1)[1]})" for rank in hung)
            return f"{named} gives no sign of life; the run ends after {idle:.0f} s without an update"
        places = "; ".join(f"rank {rank}: {sign.split(' ', 1)[1]}" for rank, sign in enumerate(after))
        return f"no update for {idle:.0f} s, the run ends; the processes are at: {places}"
