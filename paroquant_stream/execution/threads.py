"""Run jobs on threads of this process, or inline where one thread is enough."""

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
from .slots import Slot, SlotPool

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
INTERRUPT_TIMEOUT = 1.0
"""Seconds an interrupted run waits for its jobs; an fsync of gigabytes cannot be cut short."""


def run_all(
    function: Callable[[_Item, Slot], _Result],
    items: Sequence[_Item],
    jobs: int,
    trace: Trace = NO_TRACE,
    slots: SlotPool | None = None,
) -> Iterator[_Result]:
    """Call `function(item, slot)` for every item and yield the results as the calls finish.

    The first error is raised when every running job has ended; after an interrupt that wait lasts
    at most `INTERRUPT_TIMEOUT`.

    Args:
        function: A job; its `slot.check()` raises once another job failed or the run was stopped.
        items: One for each job; a single job runs inline, for a readable traceback.
        jobs: How many run at once.
        trace: Where the jobs record their stages.
        slots: A share of slots that other runs use too; the end of this run stops that share.
    """
    slots = slots or SlotPool(jobs, len(items))

    def work(item: _Item) -> _Result:
        slot = Slot(slots, trace)
        try:
            return function(item, slot)
        finally:
            slot.release()

    if jobs == 1 or len(items) <= 1:
        yield from (work(item) for item in items)
        return
    pool = ThreadPoolExecutor(min(jobs, len(items)), thread_name_prefix="worker")
    futures: list[Future[_Result]] = []
    timeout: float | None = None
    try:
        futures += [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM, or a caller that closed this generator
        timeout = INTERRUPT_TIMEOUT
        raise
    finally:
        slots.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        # a future cancelled in the queue never counts as done, so waiting for it would never end
        wait([future for future in futures if not future.cancelled()], timeout)
