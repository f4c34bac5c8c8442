"""What a job may use: one of `--jobs` slots, buffers that are reused from job to job, and helper
threads where another slot is idle.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

from ..errors import RunCancelledError
from ..trace import NO_TRACE, Trace

_POLL_SECONDS = 0.2  # between checks for cancellation while waiting for a slot
_HELPER_THREADS = 3  # two share the work that can be divided while one hashes


class Buffers:
    """Two buffers that a job reads into, reused from job to job.

    Reusing them avoids a page fault for every fresh page of every tensor.
    """

    def __init__(self) -> None:
        self._buffers = [memoryview(b""), memoryview(b"")]

    def take(self, index: int, size: int) -> memoryview:
        """Return the first bytes of a buffer, grown if it is too small.

        Args:
            index: Which buffer, 0 or 1. What it held before is overwritten.
            size: How many bytes.
        """
        if len(self._buffers[index]) < size:
            self._buffers[index] = memoryview(bytearray(size))
        return self._buffers[index][:size]


class SlotPool:
    """As many slots as jobs may run at once, and the flag that cancels these jobs.

    A slot is represented by its `Buffers`. Runs may share the slots of a pool, see `share`.
    """

    def __init__(self, count: int, waiting: int = 1, parent: SlotPool | None = None) -> None:
        """Create the slots.

        Args:
            count: How many slots.
            waiting: How many jobs will acquire a slot; helpers leave enough slots for them.
            parent: A pool whose `stop` cancels the jobs of this pool too.
        """
        self._free: queue.LifoQueue[Buffers] = queue.LifoQueue()  # LIFO: the warm buffers first
        for _ in range(count):
            self._free.put(Buffers())
        self._waiting = deque([None] * waiting)  # its length counts; both ends are thread-safe
        self._stop, self._parent = threading.Event(), parent

    def share(self, waiting: int) -> SlotPool:
        """Return a pool with the same slots for another run, which can be stopped by itself.

        Args:
            waiting: How many jobs of that run will acquire a slot.
        """
        shared = copy.copy(self)
        shared._stop, shared._parent = threading.Event(), self
        self._waiting.extend([None] * waiting)
        return shared

    def stop(self) -> None:
        """Cancel the jobs of this pool: `check` raises from now on."""
        self._stop.set()

    def check(self) -> None:
        """Return unless the run is cancelled. A job calls this after every chunk.

        Raises:
            RunCancelledError: This pool or a parent was stopped.
        """
        if self._stop.is_set():
            raise RunCancelledError("another shard failed or the run was interrupted")
        if self._parent:
            self._parent.check()

    def acquire(self) -> Buffers:
        """Wait for a free slot and take it.

        Raises:
            RunCancelledError: The run was cancelled meanwhile.
        """
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                buffers = self._free.get(timeout=_POLL_SECONDS)
                with contextlib.suppress(IndexError):  # more jobs than were announced
                    self._waiting.pop()
                return buffers

    def try_acquire(self) -> Buffers | None:
        """Take a slot for a helper, or return None if a job needs every free one."""
        with contextlib.suppress(queue.Empty):
            if self._free.qsize() > len(self._waiting):
                return self._free.get_nowait()
        return None

    def release(self, buffers: Buffers) -> None:
        """Return a slot to the pool."""
        self._free.put(buffers)


class Slot:
    """The slot that one job holds; creating it waits until one is free."""

    def __init__(self, pool: SlotPool | None = None, trace: Trace = NO_TRACE) -> None:
        """Acquire a slot.

        Args:
            pool: Where from; by default a pool of one slot.
            trace: Where the job records its stages.

        Raises:
            RunCancelledError: The run was cancelled before a slot was free.
        """
        self._pool = pool or SlotPool(1)
        self._held: Buffers | None = self._pool.acquire()
        self.trace = trace
        self.check = self._pool.check

    @property
    def buffers(self) -> Buffers:
        """The buffers of the slot."""
        if self._held is None:
            raise AssertionError("the slot is used after its release")
        return self._held

    def release(self) -> None:
        """Return the slot to the pool; a second call does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._pool.release(held)

    @contextlib.contextmanager
    def helper(self) -> Iterator[Executor | None]:
        """Provide helper threads for the body if a second slot is idle, else None."""
        second = self._pool.try_acquire()
        if second is None:
            yield None
            return
        try:
            with ThreadPoolExecutor(_HELPER_THREADS, thread_name_prefix="helper") as pool:
                yield pool
        finally:
            self._pool.release(second)
