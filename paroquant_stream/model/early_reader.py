"""Reads the entries of a first load while later shards are still converted, or copies what this
process writes of them into arrays, so that it need not be read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from weakref import ref

import mlx.core as mx

from ..errors import ParoquantStreamError
from ..files.tensor_header import TensorInfo
from ..store.entry_file import EntryCopy
from ..store.manifest import EntryRecord
from .entry_arrays import EntryArrays
from .memory import available_memory, physical_memory

Arrays = dict[str, mx.array]
_CORES = 4  # per thread: one keeps up with so many workers


class EarlyReader:
    """Threads that read entries as they are published."""

    def __init__(self, read: Callable[[EntryRecord], Arrays], copies: bool = True) -> None:
        """Start with nothing read.

        Args:
            read: Returns the lazy arrays of an entry.
            copies: Whether what was copied as it was written may replace what is in the file.
        """
        self._read_entry = read
        # of a GPU's streams one is used, and no memory is written: neither was tried there
        on_cpu = mx.default_device() == mx.cpu
        count = max(1, (os.cpu_count() or 1) // _CORES) if on_cpu else 1
        self._threads = _threads(count, os.getpid())
        self.copies = copies and on_cpu
        """Whether `begin` returns arrays where there is memory for them."""
        self._begun: list[ref[EntryArrays]] = []  # threads append while `close` walks through it
        self._found: dict[str, Future[Arrays] | EntryArrays] = {}
        self._size, self._is_closed = 0, False

    def close(self) -> None:
        """Read no more, and free what was not taken."""
        self._is_closed = True
        self._found.clear()
        for begun in self._begun:
            if copy := begun():
                copy.close()

    def begin(self, tensors: Sequence[TensorInfo]) -> EntryArrays | None:
        """Return arrays for an entry that is about to be written, if there is memory for them.

        Args:
            tensors: Of the entry, in file order.
        """
        if self._is_closed or not self.copies or not tensors or not self._fits(tensors[-1].stop):
            return None
        try:  # in a thread of its own, as a worker waits for memory, and reading takes longer
            copy = EntryArrays(tensors, _threads(1, os.getpid(), "allocator"))
        except RuntimeError:  # the system starts no more threads
            return None
        self._begun.append(ref(copy))
        self._size += tensors[-1].stop
        return copy

    def add(self, record: EntryRecord, copy: EntryCopy | None = None) -> None:
        """Take note of a published entry: read it soon, if there is memory for the arrays.

        Args:
            record: The entry.
            copy: What `begin` returned for it.
        """
        if isinstance(copy, EntryArrays) and not copy.is_closed:
            self._found[record.key] = copy
            return
        if self._fits(record.size):
            with suppress(RuntimeError):  # the system starts no more threads: it is read later
                self._found[record.key] = self._threads.submit(self._read, record)
        self._size += record.size

    def _fits(self, size: int) -> bool:
        """Return whether there is memory for an entry's arrays, and for its file in the cache."""
        free = available_memory()
        return physical_memory() > 2 * (self._size + size) if free is None else free > 2 * size

    def take(self, record: EntryRecord) -> Arrays | None:
        """Give away the arrays of an entry; None if they are to be read again.

        Raises:
            EntryDamagedError: It was damaged, and taken out of use.
        """
        found = self._found.pop(record.key, None)
        if isinstance(found, EntryArrays):
            return found.take()
        try:
            return found.result() if found else None
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
def _threads(count: int, _process: int, name: str = "reader") -> ThreadPoolExecutor:
    """Return the threads that work for every load of a process; a forked child has none of them.

    They stay, as for each thread that evaluates MLX starts another, which never ends.
    """
    return ThreadPoolExecutor(count, thread_name_prefix=name)
