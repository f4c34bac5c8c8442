"""What all commands share: exit codes, errors, signals, and the question before a removal."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO

from ..errors import ParoquantStreamError
from ..text import shown

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
NO_READER = 141  # what a shell gives for a program that SIGPIPE ended, 128 + 13


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that temps are removed on the way out."""


def run_command(body: Callable[[], int], interrupted: str) -> int:
    """Run a command's body and turn what it raises into a message and an exit code.

    Args:
        body: Does the work and returns the exit code.
        interrupted: What to print after Ctrl-C or SIGTERM.

    Returns:
        The body's code, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    if sys.stdout is None:
        complain("error: stdout is closed; redirect it, to /dev/null if nothing is to be printed")
        return 1
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _open_closed_streams()
        with _every_character():
            return body()
    except ParoquantStreamError as error:
        return print_error(error)
    except BrokenPipeError:
        raise
    except (OSError, ImportError) as error:
        return print_refusal(error)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        complain(f"error: {error}; ask for fewer jobs, or raise the limit with `ulimit -u`")
        return 1
    except MemoryError:
        complain(
            "error: the system gives no more memory; ask for fewer jobs (`--jobs 1`), or raise the "
            "limit with `ulimit -v`; finished shards are kept, run again to resume"
        )
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        complain(f"interrupted; {interrupted}")
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(line: str) -> None:
    """Print a line on stderr, if that is open and can be written."""
    try:
        if sys.stderr is not None:
            print(line, file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError:
        pass  # the exit code has to say it


def print_error(error: ParoquantStreamError) -> int:
    """Print an error's message, its control characters escaped, and return the exit code 1."""
    complain(f"error: {shown(error, keep=chr(10))}")
    return 1


def print_refusal(error: OSError | ImportError) -> int:
    """Print in one line what the system refused to do, and return the exit code 1.

    Raises an ImportError again that is not for want of descriptors: it is a defect to be reported.
    """
    out_of_files = os.strerror(errno.EMFILE)
    reason, name = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    if isinstance(error, ImportError) and out_of_files not in reason:
        raise error
    where = f"{name}: " if name else ""
    if not where and getattr(error, "errno", None) in _FULL:  # files are named, streams are not
        where = "the output cannot be written: "
        _drop_output()  # or the rest of it would fail again at the end
    advice = "; raise the limit with `ulimit -n`" if out_of_files in reason else ""
    complain(f"error: {where}{shown(reason)}{advice}")
    return 1


def _open_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed, or files would take their place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


@contextlib.contextmanager
def _every_character() -> Iterator[None]:
    """Print characters that the terminal's encoding lacks as escapes, as stderr does."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def confirm(question: str, refused: ParoquantStreamError) -> None:
    """Ask a person on the terminal. Raises `refused` unless the answer is yes."""
    if not sys.stdin.isatty():
        raise type(refused)(f"{refused}: {question} There is no terminal to ask on; add -y")
    print(f"{shown(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise refused


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its code.

    A reader of its output that went away (`| head -1`) ends it quietly with 141. After an interrupt
    it does not wait for workers that are still inside a system call.
    """
    try:
        code = _run(main)
        try:
            for stream in _streams():
                stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            code = print_refusal(error)
            _drop_output()
    except BrokenPipeError:
        code = NO_READER
        _drop_output()
    if threading.active_count() > 1 and code in (130, 143):
        os._exit(code)
    sys.exit(code)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _run(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as stop:  # argparse, after --help or wrong usage
        return stop.code if isinstance(stop.code, int) else 0


def _drop_output() -> None:
    """Give what is still buffered a place to go: the interpreter flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
