"""Ctrl-C and SIGTERM set a flag that the loops look at between updates; a second one stops at once."""

import os
import signal
import sys
from types import FrameType

_stop_requested = False


def install() -> None:
    """Handle SIGINT and SIGTERM from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _stop_requested
    if _stop_requested:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _stop_requested = True
    if os.environ.get("RANK", "0") == "0":
        print("\npdfast: stopping after this update (once more to stop at once)", file=sys.stderr, flush=True)


def requested() -> bool:
    """Tell whether the run was asked to stop."""
    return _stop_requested
