"""This process beside others: its rank, and how its threads wait."""

import os

WAITING = {"GOMP_SPINCOUNT": "3000"}
"""How OpenMP's threads wait for each other: they look 3000 times, then sleep. GNU's look 300,000 times as they come, which takes
cores from whatever else runs there, and from an update many times what it saves. Fewer looks cost a quiet machine that is slow to wake
threads more than they save (docs/results.md, "A busy machine")."""
WAITING_POLICIES = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"


def is_rank0() -> bool:
    """Tell whether this process is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def let_threads_sleep() -> None:
    """Set how OpenMP's threads wait, unless the user has: before torch is imported, which loads it."""
    if not any(name in os.environ for name in WAITING_POLICIES):
        os.environ.update(WAITING)
