"""Errors meant for people: a command prints the message as one line and ends with `exit_code`."""

INTERRUPTED = 130
NO_COMPILER = (
    "compiled code needs a C++ compiler, and none works here: install g++, or say --engine.compile off (--compile off "
    "where nothing is trained)"
)


class UsageError(Exception):
    """The input is wrong (a flag, a file, a checkpoint). The message says what, where, and what to do."""

    exit_code = 2


class RunError(Exception):
    """A run that began well failed in the middle (disk full, non-finite loss). Finished work is kept."""

    exit_code = 1


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message says how to go on."""

    exit_code = INTERRUPTED
