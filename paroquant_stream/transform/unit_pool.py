"""Where units run: inline, in threads, or on an executor, perhaps on another host with the same
files.

While a run needs its units, it keeps a lease file in the store's `tmp`. A worker that does not see
the lease file refuses the unit, because it works on another store; a worker that no longer sees it
stops. It writes into the file how many source bytes it has processed, 8 bytes for each unit. This
needs neither a lock nor a message, so it works with every executor.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ParoquantStreamError, RunCancelledError, WorkersUnfitError
from ..execution.dask import client_of
from ..execution.executors import call_all, check_workers
from ..files.descriptor import closing
from ..store.store import Store
from ..trace import NO_TRACE, Span, Trace
from .source import Buffers, Tick
from .unit import Unit, UnitResult
from .unit_runner import run_unit

POLL_SECONDS = 0.2
"""Between checks of the lease file; a network file system answers most from its cache."""
_COUNT = 8  # bytes of a count
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_thread = threading.local()


class UnitPool:
    """Runs units at most `jobs` at once, for the shards that are converted at the same time."""

    is_here = True
    """Whether all units run in this process."""

    def __init__(self, jobs: int, trace: Trace = NO_TRACE) -> None:
        """Run units inline.

        Args:
            jobs: How many units run at once.
            trace: Gets the time of each stage.
        """
        self._jobs, self._trace = jobs, trace
        self._buffers = Buffers()
        self._callers = 0
        self._lock = threading.Lock()

    def run(self, units: Sequence[Unit], tick: Tick) -> Iterator[UnitResult]:
        """Run the units of a shard and yield the results as they finish.

        Args:
            units: What is done.
            tick: Called with counts of processed bytes; what it raises cancels the units.
        """
        for unit in units:
            yield run_unit(unit, tick, self._buffers, self._trace)

    def hash(self, unit: Unit, tick: Tick) -> UnitResult:
        """Run the unit that only hashes a shard, here, as worker processes may not have started.

        Args:
            unit: It.
            tick: As for `run`.
        """
        return run_unit(unit, tick, trace=self._trace)

    def _ahead(self) -> int:
        """Return how many units of one shard may be queued or running.

        More than its share of the workers would let all of them write one file, one at a time.
        """
        return 1 + -(-self._jobs // max(self._callers, 1))

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with self._lock:
            self._callers += 1
        try:
            yield
        finally:
            with self._lock:
                self._callers -= 1


class ThreadedPool(UnitPool):
    """Runs units in threads of this process."""

    def __init__(self, jobs: int, trace: Trace, threads: Executor) -> None:
        super().__init__(jobs, trace)
        self._threads = threads

    def run(self, units: Sequence[Unit], tick: Tick) -> Iterator[UnitResult]:
        """Run units as `UnitPool.run` does."""

        def work(unit: Unit) -> UnitResult:
            return run_unit(unit, tick, _thread_buffers(), self._trace)

        calls = [(unit,) for unit in units]
        with self._calling():
            yield from call_all(self._threads, lambda: tick(0), work, calls, self._ahead)


class RemotePool(UnitPool):
    """Runs units on an executor."""

    is_here = False

    def __init__(self, jobs: int, trace: Trace, executor: Executor, lease: Path) -> None:
        super().__init__(jobs, trace)
        self._executor, self._lease = executor, lease
        self._numbers = itertools.count()
        self._host = os.uname().nodename

    def run(self, units: Sequence[Unit], tick: Tick) -> Iterator[UnitResult]:
        """Run units as `UnitPool.run` does."""
        traced = self._trace is not NO_TRACE
        with self._lock:  # consecutive numbers
            numbers = [next(self._numbers) for _ in units]
        leases = [Lease(self._lease, number, self._host, traced) for number in numbers]
        ticked = 0

        def poll() -> None:
            nonlocal ticked
            done = max(ticked, _read_counts(leases))
            tick(done - ticked)
            ticked = done

        calls = [(_absolute(unit), lease) for unit, lease in zip(units, leases, strict=True)]
        with self._calling():
            for result, spans in call_all(self._executor, poll, run_remote, calls, self._ahead):
                self._trace.spans.extend(spans)
                yield result


class ClusterPool(RemotePool):
    """Runs units on a Dask cluster, whose hosts share what there is to hash too."""

    def hash(self, unit: Unit, tick: Tick) -> UnitResult:
        """Run the unit on a worker."""
        (result,) = self.run([unit], tick)
        return result


@contextmanager
def unit_pool(
    executor: Executor | None, jobs: int, directory: Path, store: Store, trace: Trace = NO_TRACE
) -> Iterator[UnitPool]:
    """Provide the pool that runs the units of a model.

    Args:
        executor: Where they run; None for this process.
        jobs: How many run at once.
        directory: Of the model.
        store: Where the entries go.
        trace: Gets the time of each stage.

    Raises:
        WorkersUnfitError: A worker lacks the package or does not see the files.
        WorkersLostError: The executor does not answer.
    """
    if isinstance(executor, ThreadPoolExecutor):
        yield ThreadedPool(jobs, trace, executor)
    elif executor:
        with store.new_file(0) as lease:
            path = lease.path.absolute()  # a worker has a working directory of its own
            check_workers(executor, [path, directory.absolute() / "config.json"])
            kind = ClusterPool if client_of(executor) else RemotePool
            yield kind(jobs, trace, executor, path)
    elif jobs == 1:
        yield UnitPool(1, trace)
    else:
        threads = ThreadPoolExecutor(jobs, thread_name_prefix="worker")
        try:
            yield ThreadedPool(jobs, trace, threads)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Lease:
    """What a worker knows of the run that needs its unit."""

    path: Path
    """The lease file."""
    number: int
    """Of the unit, from 0 on."""
    host: str
    """The host of the run; errors on another host name that one."""
    traced: bool = False
    """Whether the stages of the unit are recorded."""

    @property
    def position(self) -> int:
        """Return the offset of the unit's count in the lease file."""
        return _COUNT * self.number


def run_remote(unit: Unit, lease: Lease) -> tuple[UnitResult, list[Span]]:
    """Run a unit in a worker of an executor, until the run that needs it has ended.

    Args:
        unit: What is done.
        lease: The lease of the run.

    Returns:
        The result, and the stages of the unit if they are traced and the worker has the clock of
        the run.

    Raises:
        WorkersUnfitError: The lease file does not exist here.
        RunCancelledError: The lease file was removed meanwhile.
        ParoquantStreamError: As `run_unit` raises.
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
        result = run_unit(unit, tick, _thread_buffers(), trace, sync=here != lease.host)
        _write_count(lease, done)
        return result, trace.spans if here == lease.host else []
    except ParoquantStreamError as error:
        if here == lease.host:
            raise
        raise type(error)(f"on {here}: {error}") from error


def _absolute(unit: Unit) -> Unit:
    """Return a unit that names its files whatever the working directory of its worker is."""
    store = replace(unit.store, root=unit.store.root.absolute())
    path = unit.path.absolute() if unit.path else None
    return replace(unit, directory=unit.directory.absolute(), store=store, path=path)


def _read_counts(leases: Sequence[Lease]) -> int:
    """Return how many source bytes of units were processed, 0 if that is unknown."""
    first, last = leases[0], leases[-1]
    with contextlib.suppress(OSError), closing(os.open(first.path, _READ)) as fd:
        data = os.pread(fd, last.position + _COUNT - first.position, first.position)
        return sum(
            int.from_bytes(data[at : at + _COUNT], "little") for at in range(0, len(data), _COUNT)
        )
    return 0


def _write_count(lease: Lease, done: int) -> None:
    """Tell the run how many source bytes were processed; only its progress bar needs it."""
    with contextlib.suppress(OSError), closing(os.open(lease.path, _WRITE)) as fd:
        os.pwrite(fd, done.to_bytes(_COUNT, "little"), lease.position)


def _thread_buffers() -> Buffers:
    """Return the buffers of this thread; new ones for each unit would make a worker grow."""
    if not hasattr(_thread, "buffers"):
        _thread.buffers = Buffers()
    buffers: Buffers = _thread.buffers
    return buffers


def _lease_exists(lease: Path) -> bool:
    try:
        os.stat(lease)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError:  # a server that does not answer now does not mean that the run has ended
        return True
    return True
