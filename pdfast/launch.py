"""torchrun that ends as the commands do:

    python -m pdfast.launch --standalone --nproc-per-node 8 -m pdfast.distill --preset cifar10-fast --data cifar10.npz

It takes torchrun's arguments, starts the same processes, and ends with the line and the exit code of the one that failed
or was stopped, where torchrun has a traceback and 1.
"""

import logging
import os
import shutil
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes, run

from pdfast.cli import LAUNCHED, SHOWN, run_command
from pdfast.io.errors import INTERRUPTED, Interrupted, RunError, UsageError
from pdfast.io.files import check_folder

ENDINGS = {kind.exit_code: kind for kind in (UsageError, RunError, Interrupted)}
# What they say when a process ends is said here in one line.
TOO_LOUD = "torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"


def refuse(message: str) -> NoReturn:
    raise UsageError(f"{message}; see python -m pdfast.launch --help")


def parse_arguments() -> Namespace:
    """As torchrun; but `--run` of a command is no abbreviation of an option of torchrun."""
    parser = get_args_parser()
    parser.prog, parser.allow_abbrev = "python -m pdfast.launch", False
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args()


def check_counts(options: Namespace) -> None:
    """Raise a UsageError for counts of processes or machines that there cannot be."""
    try:
        processes = determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        refuse(f"--nproc-per-node {options.nproc_per_node}: {str(error).rstrip('.')}")
    if processes < 1:
        refuse(f"--nproc-per-node {options.nproc_per_node}: at least one process is needed")
    try:
        least, most = parse_min_max_nnodes(options.nnodes)
    except (RuntimeError, ValueError):
        least = most = 0
    if not 0 < least <= most:
        refuse(f"--nnodes {options.nnodes} is neither a number of machines nor MIN:MAX")


def check_program(options: Namespace) -> None:
    """Raise a UsageError where there is no such module, script or program."""
    name = options.training_script
    if options.no_python:
        if shutil.which(name) is None:
            refuse(f"there is no program {name}")
    elif not options.module:
        if not Path(name).exists():
            refuse(f"there is no script {name} (a module is given as -m NAME)")
    elif "PYTHON_EXEC" not in os.environ and not is_module(name):  # which names another interpreter, with other modules
        refuse(f"there is no module {name} that python -m runs")


def is_module(name: str) -> bool:
    """Tell whether `python -m` finds it; a package is run by its __main__."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except (ImportError, ValueError):  # of a package around it; of a name that is none
        return False
    return spec is not None


def line_of(failure: ProcessFailure) -> str | None:
    """Return what the process that failed said last; None where it is not known."""
    if isinstance(failure.message, dict):
        return failure.message["message"].removeprefix("pdfast: ").removeprefix("error: ")
    return None


def main() -> None:
    options = parse_arguments()
    check_counts(options)
    check_program(options)
    if options.log_dir is not None and options.log_dir != os.devnull:
        check_folder(Path(options.log_dir), "choose another folder with --log-dir")
    for name in TOO_LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if options.max_restarts == 0:  # else what ended a process would be left to one that goes on
        os.environ[LAUNCHED] = "1"
    try:
        run(options)
    except (AssertionError, ValueError) as error:  # of torchrun's own, before a process was started
        refuse(f"torchrun cannot start with these arguments ({error})")
    except (RendezvousError, torch.distributed.DistError) as error:
        reason = " ".join(str(error).split())[:SHOWN]
        raise RunError(f"the processes cannot meet ({reason}): is the address right, and its port free?") from None
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
