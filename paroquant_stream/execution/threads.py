"""Runs jobs on threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from typing import TypeVar

from ..trace import NO_TRACE, Trace
from .slots import Places, Worker

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
PATIENCE = 1.0
"""Seconds an interrupted run waits for its workers; an fsync of gigabytes cannot be cut short."""


def run_all(
    function: Callable[[_Item, Worker], _Result],
    items: Sequence[_Item],
    jobs: int,
    trace: Trace = NO_TRACE,
    places: Places | None = None,
) -> Iterator[_Result]:
    """`function(item, worker)` of every item, as they finish, at most `jobs` at work at once.

    `worker.check()` raises RunCancelledError once another job has failed or the caller was interrupted; a
    job calls it after every chunk. The first error is raised when every running job has ended;
    an interrupt after `PATIENCE`, with jobs perhaps still running. `places`: a share of places
    that other runs use too; the end of this run stops it.
    """
    places = places or Places(jobs, len(items))

    def work(item: _Item) -> _Result:
        worker = Worker(places, trace)
        try:
            return function(item, worker)
        finally:
            worker.leave()

    if jobs == 1 or len(items) <= 1:
        yield from (work(item) for item in items)
        return
    pool = ThreadPoolExecutor(min(jobs, len(items)), thread_name_prefix="worker")
    futures: list[Future[_Result]] = []
    patience: float | None = None
    try:
        futures += [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM, or a caller that stopped listening
        patience = PATIENCE
        raise
    finally:
        places.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        # a future cancelled in the queue never counts as done, so waiting for it would never end
        wait([future for future in futures if not future.cancelled()], patience)
