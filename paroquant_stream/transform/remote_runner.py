"""Convert a shard on an executor: in another process, perhaps on another host, with the same files.

While a run needs its shards, it keeps a lease file in the store's `tmp`. A worker that does not see
the lease file refuses the shard, because it works on another store; a worker that no longer sees it
stops. This needs neither a lock nor a message, so it works with every executor.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import ParoquantStreamError, RunCancelledError, WorkersUnfitError
from ..execution.executors import call_on, check_workers
from ..execution.slots import Slot, SlotPool
from ..store.store import Store
from .source import Tick
from .task_runner import Job, Outcome, run_task

POLL_SECONDS = 0.2
"""Between checks of the lease file; a network file system answers most from its cache."""
_thread = threading.local()


@contextmanager
def runner(
    executor: Executor | None, directory: Path, store: Store
) -> Iterator[Callable[[Job, Slot, Tick], Outcome]]:
    """Provide `run_task`, or a function that runs it on an executor.

    On an executor the tick is not called and the stages inside a shard are not traced.

    Args:
        executor: Where the jobs run; None for this process.
        directory: Of the model.
        store: Where the entries go.

    Raises:
        WorkersUnfitError: A worker lacks the package or does not see the files.
        WorkersLostError: The executor does not answer.
    """
    if executor is None:
        yield run_task
        return
    directory = directory.absolute()  # a worker has a working directory of its own
    store, host = replace(store, root=store.root.absolute()), os.uname().nodename
    with store.new_file(0) as lease:
        check_workers(executor, [lease.path, directory / "config.json"])

        def run(job: Job, slot: Slot, _tick: Tick) -> Outcome:
            sent = replace(job, directory=directory, store=store)
            return call_on(executor, slot.check, run_remote, sent, lease.path, host)

        yield run


def run_remote(job: Job, lease: Path, host: str) -> Outcome:
    """Run a job in a worker of an executor, until the run that needs it has ended.

    Args:
        job: What is converted.
        lease: The lease file of the run.
        host: The host of the run; errors on another host name that one.

    Raises:
        WorkersUnfitError: The lease file does not exist here.
        RunCancelledError: The lease file was removed meanwhile.
        ParoquantStreamError: As `run_task` raises.
    """
    here, checked = os.uname().nodename, time.monotonic()

    def tick(_count: int) -> None:
        nonlocal checked
        if time.monotonic() - checked >= POLL_SECONDS:
            checked = time.monotonic()
            if not _lease_exists(lease):
                raise RunCancelledError("the run that needed this shard has ended")

    try:
        if not _lease_exists(lease):
            raise WorkersUnfitError(
                f"{lease}: a worker on {here} does not see it; the cache must have the same path "
                "on one shared file system, or the run has ended"
            )
        slot = Slot(_thread_slots())
        try:
            return run_task(job, slot, tick)
        finally:
            slot.release()
    except ParoquantStreamError as error:
        if here == host:
            raise
        raise type(error)(f"on {here}: {error}") from error


def _thread_slots() -> SlotPool:
    """Return the slot of this thread; new buffers for each shard would make a worker grow."""
    if not hasattr(_thread, "slots"):
        _thread.slots = SlotPool(1)
    slots: SlotPool = _thread.slots
    return slots


def _lease_exists(lease: Path) -> bool:
    try:
        os.stat(lease)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError:  # a server that does not answer now does not mean that the run has ended
        return True
    return True
