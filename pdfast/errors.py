"""Errors meant for people: a command prints the message as one line and ends with `exit_code`."""


class UsageError(Exception):
    """The input is wrong (a flag, a file, a checkpoint). The message says what, where, and what to do."""

    exit_code = 2


class RunError(Exception):
    """A run that began well failed in the middle (disk full, non-finite loss). Finished work is kept."""

    exit_code = 1
