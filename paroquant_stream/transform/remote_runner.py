"""Convert a shard on an executor: in another process, perhaps on another host, with the same files.

While a run needs its shards, it keeps a lease file in the store's `tmp`. A worker that does not see
the lease file refuses the shard, because it works on another store; a worker that no longer sees it
stops. It writes into the file how many source bytes it has processed, 8 bytes for each job. This
needs neither a lock nor a message, so it works with every executor.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ParoquantStreamError, RunCancelledError, WorkersUnfitError
from ..execution.executors import call_on, check_workers
from ..execution.slots import Slot, SlotPool
from ..files.descriptor import closing
from ..store.store import Store
from ..trace import NO_TRACE, Span, Trace
from .source import Tick
from .task_runner import Job, Outcome, run_task

POLL_SECONDS = 0.2
"""Between checks of the lease file; a network file system answers most from its cache."""
_COUNT = 8  # bytes of a count
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_thread = threading.local()


@contextmanager
def runner(
    executor: Executor | None, directory: Path, store: Store
) -> Iterator[Callable[[Job, Slot, Tick], Outcome]]:
    """Provide `run_task`, or a function that runs it on an executor.

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
    numbers = itertools.count()
    with store.new_file(0) as lease:
        check_workers(executor, [lease.path, directory / "config.json"])

        def run(job: Job, slot: Slot, tick: Tick) -> Outcome:
            place = Lease(lease.path, next(numbers), host, slot.trace is not NO_TRACE)
            ticked = 0

            def poll() -> None:
                nonlocal ticked
                slot.check()
                done = max(ticked, _read_count(place))
                tick(done - ticked)
                ticked = done

            sent = replace(job, directory=directory, store=store)
            outcome, spans = call_on(executor, poll, run_remote, sent, place)
            slot.trace.spans.extend(spans)
            return outcome

        yield run


@dataclass(frozen=True)
class Lease:
    """What a worker knows of the run that needs its job."""

    path: Path
    """The lease file."""
    number: int
    """Of the job, from 0 on."""
    host: str
    """The host of the run; errors on another host name that one."""
    traced: bool = False
    """Whether the stages of the job are recorded."""

    @property
    def position(self) -> int:
        """Return the offset of the job's count in the lease file."""
        return _COUNT * self.number


def run_remote(job: Job, lease: Lease) -> tuple[Outcome, list[Span]]:
    """Run a job in a worker of an executor, until the run that needs it has ended.

    Args:
        job: What is converted.
        lease: The lease of the run.

    Returns:
        The outcome, and the stages of the job if they are traced and the worker has the clock of
        the run.

    Raises:
        WorkersUnfitError: The lease file does not exist here.
        RunCancelledError: The lease file was removed meanwhile.
        ParoquantStreamError: As `run_task` raises.
    """
    here, checked, done = os.uname().nodename, time.monotonic(), 0

    def tick(count: int) -> None:
        nonlocal checked, done
        done += count
        if time.monotonic() - checked >= POLL_SECONDS:
            checked = time.monotonic()
            if not _lease_exists(lease.path):
                raise RunCancelledError("the run that needed this shard has ended")
            _write_count(lease, done)

    try:
        if not _lease_exists(lease.path):
            raise WorkersUnfitError(
                f"{lease.path}: a worker on {here} does not see it; the cache must have the same "
                "path on one shared file system, or the run has ended"
            )
        trace = Trace(f"process {os.getpid()}") if lease.traced else NO_TRACE
        slot = Slot(_thread_slots(), trace)
        try:
            outcome = run_task(job, slot, tick)
        finally:
            slot.release()
        return outcome, trace.spans if here == lease.host else []
    except ParoquantStreamError as error:
        if here == lease.host:
            raise
        raise type(error)(f"on {here}: {error}") from error


def _read_count(lease: Lease) -> int:
    """Return how many source bytes of a job its worker has processed, 0 if that is unknown."""
    with contextlib.suppress(OSError), closing(os.open(lease.path, _READ)) as fd:
        return int.from_bytes(os.pread(fd, _COUNT, lease.position), "little")
    return 0


def _write_count(lease: Lease, done: int) -> None:
    """Tell the run how many source bytes were processed; only its progress bar needs it."""
    with contextlib.suppress(OSError), closing(os.open(lease.path, _WRITE)) as fd:
        os.pwrite(fd, done.to_bytes(_COUNT, "little"), lease.position)


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
