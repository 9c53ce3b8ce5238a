"""How every command ends: a person's mistake is one line and exit code 2, a failure in the middle one line and 1."""

import atexit
import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from pdfast.io import interrupt
from pdfast.io.errors import INTERRUPTED, NO_COMPILER, Interrupted, RunError, UsageError
from pdfast.io.process import is_rank0

STOPPED_EARLY = "pdfast: stopped before there was anything to save"
_FORMAT_WARNING = warnings.formatwarning
LAUNCHED = "PDFAST_LAUNCHED"
"""In the environment of processes whose last line `pdfast.launch` prints."""
_NO_COMPILER = r"No working C\+\+ compiler|InvalidCxxCompiler|Failed to find C compiler"  # of Inductor, of Triton
_NO_MEMORY = r"can't allocate memory|out of memory"  # on a CPU, on a GPU
SHOWN = 120  # characters of what torch says
PEER_SECONDS = 20.0  # that a process which failed has to end, before those that lost it do
_LOST = r"Connection (closed|reset)|Broken pipe|Read error|Timed out|NCCL|gloo"  # how a collective ends without a peer


class _PeerLost(RunError):
    """Another process of the run has ended."""


T = TypeVar("T")


def stop_while_importing() -> None:
    """Let Ctrl-C end this process at once, in one line, until `run_command`: imports take seconds, and some swallow it."""

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), f"{STOPPED_EARLY}\n".encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody's
        signal.signal(signal.SIGINT, stop)


def parse(arguments: type[T], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse the command line into an `arguments` dataclass. UsageError, in one line, where it does not parse."""
    from pdfast.flags import reader  # here, since `import pdfast` imports this module, and tyro takes time

    tyro = reader()
    options: dict[str, Any] = {} if default is None else {"default": default}
    with parsing(prog):
        return tyro.cli(arguments, prog=prog, description=description, **options)


@contextlib.contextmanager
def parsing(prog: str) -> Iterator[None]:
    """Turn a parsing error of tyro's into a one-line UsageError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
            return
    except SystemExit as end:
        if not end.code:
            raise
    # tyro frames a title and text, with rules between its parts (blanks and hyphens where the terminal has no box characters).
    lines = [line.strip(" │╭╮╰╯") for line in said.getvalue().splitlines()[1:]]
    message = re.sub(r"[─-]{4,}", ";", " ".join(line for line in lines if line))
    message = re.split(r" (?:For full helptext|Argument helptext)", message)[0]
    raise UsageError(f"{message.strip(' ;')}; see {prog} --help")


def _tell_torchrun(message: str) -> bool:
    """Leave the line where torchrun looks for a worker's error, so that its own summary ends with it; whether that could be."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    report = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        Path(path).write_text(json.dumps(report))
    except OSError:
        return False
    return True


def _print_last_line(line: str, *, of_all: bool = True) -> bool:
    """Leave the line that a process ends with to torchrun, and print it, in rank 0 alone unless `of_all`; whether
    `pdfast.launch` prints it instead, which it does unless it was stopped."""
    told = _tell_torchrun(line)
    if told and LAUNCHED in os.environ and not interrupt.requested():
        return True
    if is_rank0() or of_all:
        print(line, file=sys.stderr, flush=True)
    return False


def _end_after_the_peer() -> None:
    """The launcher prints the line of the process that ended first, which is to be the one that was lost; then it ends this
    one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PEER_SECONDS)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of our own in one line, without their place in the code, of rank 0 alone; others as ever."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"pdfast: warning: {message}\n" if is_rank0() else ""
    return _FORMAT_WARNING(message, category, filename, lineno, line)


def _shortened(reason: str) -> str:
    """Return the sentences of what torch says that have room, the first in any case: of memory it says first how much was
    asked for."""
    first, *others = re.split(r"(?<=\.) (?=[A-Z])", reason)
    text = first if len(first) <= SHOWN else f"{first[:SHOWN].rpartition(' ')[0]} ..."
    for sentence in others:
        if len(text) + len(sentence) >= SHOWN:
            break
        text += f" {sentence}"
    return text.removesuffix(".")


def _explained(error: BaseException) -> UsageError | RunError | None:
    """Return what a failure of torch or Python means for people, None where that is not known."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = _shortened(re.sub(r"^\[enforce fail at [^]]*\] .*?\. ", "", reason))
    if isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error)):
        return RunError(
            f"out of memory ({reason}): take a smaller batch, of training by --engine.micro-batches, "
            "--engine.recompute or a smaller --batch-size; what was saved before is kept"
        )
    if re.search(_NO_COMPILER, str(error)):
        return UsageError(NO_COMPILER)
    if "WORLD_SIZE" in os.environ and re.search(_LOST, str(error)):
        return _PeerLost(f"lost another process of the run ({reason}); see what it said")
    return None


def _exit_code(main: Callable[[], None]) -> int:
    """Run a command's main function and say how it ended, in one line; the exit code."""
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:  # it was closed by whoever started this
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, RunError) as error:  # what is wrong is wrong for all; of the others torchrun tells
        _print_last_line(f"pdfast: error: {' '.join(str(error).split())}", of_all=False)
        return error.exit_code
    except Interrupted as error:
        line = f"pdfast: {' '.join(str(error).split())}"
        if is_rank0():
            print(line, file=sys.stderr, flush=True)
        _tell_torchrun(line)
        return error.exit_code
    except (RuntimeError, MemoryError) as error:
        if (known := _explained(error)) is None:
            raise
        if _print_last_line(f"pdfast: error: {known}") and isinstance(known, _PeerLost):
            _end_after_the_peer()
        return known.exit_code
    except OSError as error:  # a place that cannot be read or written, which nothing expected
        if error.filename is None and error.errno == errno.ENOSPC:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _print_last_line(f"pdfast: error: the output could not be written ({error.strerror})")
            return 1
        if error.filename is None:
            raise
        _print_last_line(f"pdfast: error: cannot use {error.filename} ({error.strerror})")
        return 1
    except KeyboardInterrupt:
        print(STOPPED_EARLY, file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def _had_process_groups() -> bool:
    """Tell whether this process has been one of several."""
    world = sys.modules.get("pdfast.engine.world")  # not imported here: it takes torch
    return world is not None and world.opened_process_groups


def _leave(code: int) -> NoReturn:
    """End this process, which is one of several, without taking the interpreter down: a thread of gloo that still has to let
    go of a tensor would abort the process there (torch 2.13), after all its work was done."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's main function and exit with its code: 0, 1 (failed in the middle), 2 (bad input), 130 (stopped)."""
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console may lack letters that a name has
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = _exit_code(main)
    except Exception:  # of which nothing is known
        if not _had_process_groups():
            raise
        traceback.print_exc()
        code = 1
    if _had_process_groups():
        _leave(code)
    sys.exit(code)
