"""Run jobs on threads of this process, or inline where one thread is enough."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ExecutionError
from .automatic import Automatic
from .cancellation import Cancellation

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
POLL_SECONDS = 0.2
"""Longest wait of the main thread: a signal cuts none short that it meets at its beginning, or that
another thread receives."""
INTERRUPT_TIMEOUT = 1.0
"""Seconds an interrupted run waits for its jobs; an fsync of gigabytes cannot be cut short."""


@dataclass(frozen=True)
class Shared:
    """What the conversions of several models have in common."""

    automatic: Automatic
    """Has the worker processes of all of them, if one is large."""
    threads: Executor
    """Convert all of them, if none is."""
    cancellation: Cancellation
    """The end of the call that converts them."""


@contextmanager
def translate_refusals() -> Iterator[None]:
    """Raise ExecutionError where the body cannot start a thread.

    Raises:
        ExecutionError: The system starts no more threads, or the program is ending.
    """
    try:
        yield
    except RuntimeError as error:  # the standard library has no class for these
        if "interpreter shutdown" in str(error) or "register atexit" in str(error):
            raise ExecutionError(
                "the program ended while a thread of it was converting; let its main thread wait "
                "for that one (`Thread.join`), then run again: finished shards are kept"
            ) from error
        if "start new thread" in str(error):
            raise ExecutionError(
                f"the system starts no more threads ({error}); ask for fewer jobs (`--jobs 1`), or "
                "raise the limit with `ulimit -u`; finished shards are kept, run again to resume"
            ) from error
        raise


def run_all(
    function: Callable[[_Item, Cancellation], _Result],
    items: Sequence[_Item],
    threads: int,
    parent: Cancellation | None = None,
) -> Iterator[_Result]:
    """Call `function(item, cancellation)` for every item and yield results as the calls finish.

    The first error is raised when every running call has ended; after an interrupt that wait lasts
    at most `INTERRUPT_TIMEOUT`.

    Args:
        function: A job; its `cancellation.check()` raises once another job failed or the run was
            stopped.
        items: One for each job; a single job runs inline, for a readable traceback.
        threads: How many run at once.
        parent: Of the run that this one is a part of.

    Raises:
        ExecutionError: The system starts no more threads, or the program is ending.
    """
    cancellation = Cancellation(parent)
    if threads == 1 or len(items) <= 1:
        yield from (function(item, cancellation) for item in items)
        return
    pool = ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="job")
    futures: list[Future[_Result]] = []
    timeout: float | None = None
    try:
        with translate_refusals():
            futures += [pool.submit(function, item, cancellation) for item in items]
        running = set(futures)
        while running:
            done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM, or a caller that closed this generator
        timeout = INTERRUPT_TIMEOUT
        raise
    finally:
        cancellation.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        # a future cancelled in the queue never counts as done, so waiting for it would never end
        wait([future for future in futures if not future.cancelled()], timeout)


def in_background(function: Callable[[], object], name: str) -> None:
    """Call a function in a thread that nothing waits for, if the system starts one.

    An interrupt reaches the main thread alone, so it does not cut the function short.

    Args:
        function: What it raises is ignored.
        name: Of the thread.
    """

    def call() -> None:
        with suppress(BaseException):  # a thread would print it, or for SystemExit end in silence
            function()

    with suppress(RuntimeError):
        threading.Thread(target=call, name=name, daemon=True).start()
