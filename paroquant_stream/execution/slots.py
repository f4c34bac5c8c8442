"""What a job may use: one of `--jobs` places, memory that is kept from job to job, and helpers
where a place is left over.
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

_LOOK = 0.2  # s between looks at whether to stop, while waiting for a place


class Buffers:
    """Memory that one worker reads into, task after task.

    Fresh pages for every linear cost more than repacking it: 28,000 faults for 117 MB.
    """

    def __init__(self) -> None:
        self._slots = [memoryview(b""), memoryview(b"")]

    def take(self, slot: int, size: int) -> memoryview:
        """`size` bytes; what was taken from the same slot before is overwritten."""
        if len(self._slots[slot]) < size:
            self._slots[slot] = memoryview(bytearray(size))
        return self._slots[slot][:size]


class Places:
    """As many places as jobs may work at once; each holds the buffers of the last who had it.

    Runs that share them are stopped each by itself, or all together.
    """

    def __init__(self, count: int, waiting: int = 1, above: Places | None = None) -> None:
        """`waiting`: how many jobs will come for a place. `above`: what stops these too."""
        self._free: queue.LifoQueue[Buffers] = queue.LifoQueue()  # the last used is warm
        for _ in range(count):
            self._free.put(Buffers())
        self._waiting = deque([None] * waiting)  # as long as there are jobs; ends are thread-safe
        self._stop, self._above = threading.Event(), above

    def share(self, waiting: int) -> Places:
        """The same places for one more run, of `waiting` jobs; stopping it stops no other."""
        shared = copy.copy(self)
        shared._stop, shared._above = threading.Event(), self
        self._waiting.extend([None] * waiting)
        return shared

    def stop(self) -> None:
        """From now on `check` raises RunCancelledError."""
        self._stop.set()

    def check(self) -> None:
        """Raises RunCancelledError once the run is to end; a job calls it after every chunk."""
        if self._stop.is_set():
            raise RunCancelledError("another shard failed or the run was interrupted")
        if self._above:
            self._above.check()

    def wait(self) -> Buffers:
        """A place for a job, as soon as there is one. Raises RunCancelledError."""
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                buffers = self._free.get(timeout=_LOOK)
                with contextlib.suppress(IndexError):  # more came than were announced
                    self._waiting.pop()
                return buffers

    def ask(self) -> Buffers | None:
        """A place for a helper, if one is free that no job will come for."""
        with contextlib.suppress(queue.Empty):
            if self._free.qsize() > len(self._waiting):
                return self._free.get_nowait()
        return None

    def free(self, buffers: Buffers) -> None:
        """Gives a place back."""
        self._free.put(buffers)


class Worker:
    """One job's hold on the places; waits for one when it is made."""

    def __init__(self, places: Places | None = None, trace: Trace = NO_TRACE) -> None:
        self._places = places or Places(1)
        self._held: Buffers | None = self._places.wait()
        self.trace = trace
        self.check = self._places.check

    @property
    def buffers(self) -> Buffers:
        """The memory that comes with the place."""
        if self._held is None:
            raise AssertionError("a job that gave its place back works on")
        return self._held

    def leave(self) -> None:
        """Gives the place back, if this job still has it."""
        held, self._held = self._held, None
        if held is not None:
            self._places.free(held)

    @contextlib.contextmanager
    def helper(self) -> Iterator[Executor | None]:
        """Threads beside the job's own while the body runs, if a second place is free; else None.

        Three, since two share what can be cut while one hashes.
        """
        second = self._places.ask()
        if second is None:
            yield None
            return
        try:
            with ThreadPoolExecutor(3, thread_name_prefix="helper") as pool:
                yield pool
        finally:
            self._places.free(second)
