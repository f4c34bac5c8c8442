"""Reads the entries of a first load while later shards are still converted."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from ..errors import ParoquantStreamError
from ..store.manifest import EntryRecord

Arrays = dict[str, mx.array]
_MEMINFO = Path("/proc/meminfo")
_LINUX = _MEMINFO.exists()


class EarlyReader:
    """A thread that reads entries as they are published."""

    def __init__(self, read: Callable[[EntryRecord], Arrays]) -> None:
        """Start with nothing read.

        Args:
            read: Returns the lazy arrays of an entry.
        """
        self._read_entry = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._found: dict[str, Future[Arrays]] = {}
        self._size = 0

    def __enter__(self) -> EarlyReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._found.clear()

    def add(self, record: EntryRecord) -> None:
        """Read a published entry soon, if there is memory for the arrays and the files."""
        self._size += record.size
        if _spare_memory() > 2 * (record.size if _LINUX else self._size):
            self._found[record.key] = self._thread.submit(self._read, record)

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
        arrays = self._read_entry(record)
        mx.eval(arrays)
        return arrays


def _spare_memory() -> int:
    """Return the bytes of memory that Linux can spare now; elsewhere all that there is."""
    if _LINUX:
        with suppress(OSError, KeyError, ValueError):
            fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
            return int(fields["MemAvailable"].split()[0]) << 10
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
