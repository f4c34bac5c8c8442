"""How a command's process ends: its exit code, a reader that went away, workers that still run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

NO_READER = 141  # what a shell gives for a program that SIGPIPE ended, 128 + 13


def end_with(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its code.

    A reader of its output that went away (`| head -1`) ends it quietly with 141. After an interrupt
    it does not wait for workers that are still inside a system call.
    """
    try:
        code = _run(main)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = NO_READER
        _drop_output()
    if threading.active_count() > 1 and code in (130, 143):
        os._exit(code)
    sys.exit(code)


def _run(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as stop:  # argparse, after --help or wrong usage
        return stop.code if isinstance(stop.code, int) else 0


def _drop_output() -> None:
    """Gives what is still buffered a place to go: the interpreter flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
