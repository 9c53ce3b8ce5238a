"""torchrun that ends as the commands do:

    python -m pdfast.launch --standalone --nproc-per-node 8 -m pdfast.distill --preset cifar10-fast --data cifar10.npz

It takes torchrun's arguments, starts the same processes, and ends with the line and the exit code of the one that failed
or was stopped, where torchrun has a traceback and 1.
"""

import logging
import os
import sys
from argparse import Namespace

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, run

from pdfast.cli import INTERRUPTED, LAUNCHED, Interrupted, run_command
from pdfast.errors import RunError, UsageError

ENDINGS = {kind.exit_code: kind for kind in (UsageError, RunError, Interrupted)}
# What they say when a process ends is said here in one line.
TOO_LOUD = "torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"


def parse_arguments() -> Namespace:
    """As torchrun; but `--run` of a command is no abbreviation of an option of torchrun."""
    parser = get_args_parser()
    parser.prog, parser.allow_abbrev = "python -m pdfast.launch", False
    return parser.parse_args()


def line_of(failure: ProcessFailure) -> str | None:
    """What the process that failed said last; None where it is not known."""
    if isinstance(failure.message, dict):
        return failure.message["message"].removeprefix("pdfast: ").removeprefix("error: ")
    return None


def main() -> None:
    options = parse_arguments()
    for name in TOO_LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if options.max_restarts == 0:  # else what ended a process would be left to one that goes on
        os.environ[LAUNCHED] = "1"
    try:
        run(options)
    except SignalException:  # which it has passed on; the processes have said where they stopped
        sys.exit(INTERRUPTED)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        line, alone = line_of(failure), rank == 0 and options.nproc_per_node == "1"
        if alone and line and failure.exitcode == INTERRUPTED:
            sys.exit(INTERRUPTED)  # it has just been printed
        if failure.exitcode < 0:
            line = f"it was killed by {failure.signal_name()}"
        line = line or f"it ended with exit code {failure.exitcode}; see what it said above"
        raise ENDINGS.get(failure.exitcode, RunError)(line if alone else f"rank {rank}: {line}") from None
    finally:
        os.environ.pop(LAUNCHED, None)  # what is said here is printed


if __name__ == "__main__":
    run_command(main)
