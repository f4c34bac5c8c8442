"""Reads the entries of a first load while later shards are still converted."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import mlx.core as mx

from ..errors import ParoquantStreamError
from ..store.manifest import EntryRecord
from .memory import available_memory, physical_memory

Arrays = dict[str, mx.array]
_CORES = 4  # per thread: one keeps up with so many workers


class EarlyReader:
    """Threads that read entries as they are published."""

    def __init__(self, read: Callable[[EntryRecord], Arrays]) -> None:
        """Start with nothing read.

        Args:
            read: Returns the lazy arrays of an entry.
        """
        self._read_entry = read
        # of a GPU's streams one is used: several were not tried there
        count = max(1, (os.cpu_count() or 1) // _CORES) if mx.default_device() == mx.cpu else 1
        self._threads = _threads(count, os.getpid())
        self._found: dict[str, Future[Arrays]] = {}
        self._size, self._is_closed = 0, False

    def close(self) -> None:
        """Read no more, and free what was not taken."""
        self._is_closed = True
        self._found.clear()

    def add(self, record: EntryRecord) -> None:
        """Read a published entry soon, if there is memory for the arrays and the files."""
        self._size += record.size
        free = available_memory()
        fits = physical_memory() > 2 * self._size if free is None else free > 2 * record.size
        if fits:
            with suppress(RuntimeError):  # the system starts no more threads: it is read later
                self._found[record.key] = self._threads.submit(self._read, record)

    def take(self, record: EntryRecord) -> Arrays | None:
        """Give away the arrays of an entry; None if they are to be read again.

        Raises:
            EntryDamagedError: It was damaged, and taken out of use.
        """
        future = self._found.pop(record.key, None)
        try:
            return future.result() if future else None
        except ParoquantStreamError:
            raise
        except Exception:  # of MLX, whose next reading tells why
            return None

    def _read(self, record: EntryRecord) -> Arrays:
        if self._is_closed:
            return {}
        arrays = self._read_entry(record)
        mx.eval(arrays)
        return arrays


@cache
def _threads(count: int, _process: int) -> ThreadPoolExecutor:
    """Return the threads that read for every load of a process; a forked child has none of them.

    They stay, as for each thread that evaluates MLX starts another, which never ends.
    """
    return ThreadPoolExecutor(count, thread_name_prefix="reader")
