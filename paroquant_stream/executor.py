"""Where jobs run: inline, or in threads of this process; results come as they finish.

Threads and processes were even on 2 cores (numpy and hashlib release the interpreter's lock), and
threads start at once, so threads it is. One job runs inline, for a traceback that a person can
read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import TypeVar

from .errors import Cancelled

PATIENCE = 1.0
"""Seconds an interrupted run waits for its workers; an fsync of gigabytes cannot be cut short."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_all(
    function: Callable[[_Item, Callable[[], None]], _Result], items: Sequence[_Item], jobs: int
) -> Iterator[_Result]:
    """`function(item, checkpoint)` of every item, as they finish, at most `jobs` at once.

    `checkpoint()` raises Cancelled once another job has failed or the caller was interrupted; a job
    calls it after every chunk. The first error is raised when every running job has ended;
    an interrupt after `PATIENCE`, with jobs perhaps still running.
    """
    if jobs == 1 or len(items) <= 1:
        for item in items:
            yield function(item, lambda: None)
        return
    stop = threading.Event()

    def checkpoint() -> None:
        if stop.is_set():
            raise Cancelled("another shard failed or the run was interrupted")

    pool = ThreadPoolExecutor(min(jobs, len(items)))
    futures: list[Future[_Result]] = []
    patience: float | None = None
    try:
        futures += [pool.submit(function, item, checkpoint) for item in items]
        for future in as_completed(futures):
            yield future.result()
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM, or a caller that stopped listening
        patience = PATIENCE
        raise
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        # a future cancelled in the queue never counts as done, so waiting for it would never end
        wait([future for future in futures if not future.cancelled()], patience)
