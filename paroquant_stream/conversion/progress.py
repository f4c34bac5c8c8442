"""How far each shard is: bytes downloaded, hashed and converted, reported to the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..options import check

if TYPE_CHECKING:
    from ..plan.task import Task

Progress = Callable[[str, int, int], None]
"""Called with a shard's name, the source bytes of it that are done, and its size."""
ProgressOption = Progress | bool | None
"""A function; True for bars, or lines where stderr is no terminal; False for nothing; None for bars
on a terminal or in a notebook, else nothing."""


def check_progress(progress: object) -> None:
    """Raise ValueError unless it is a `ProgressOption`."""
    fits = progress is None or isinstance(progress, bool) or callable(progress)
    check("progress", progress, "True, False, None or a function", fits)


class Tally:
    """Turn counts of bytes into progress.

    Every source byte is counted twice, hashed and converted, and once more if it is downloaded.
    """

    def __init__(
        self, progress: Progress | None, tasks: Sequence[Task], absent: Sequence[Sequence[str]]
    ) -> None:
        fetched = {shard for shards in absent for shard in shards}
        self._progress = progress
        self._sizes = {task.shard: task.size for task in tasks}
        self._passes = {shard: 3 if shard in fetched else 2 for shard in self._sizes}
        self._ticked = dict.fromkeys(self._sizes, 0)
        self._lock = threading.Lock()  # download, hash and conversion tick from their threads

    def announce(self) -> None:
        """Name every shard and its size, so that all are known before the first is done."""
        if self._progress:
            for shard, size in self._sizes.items():
                self._progress(shard, 0, size)

    def add(self, shard: str, count: int) -> None:
        """Count bytes of a shard that were downloaded, hashed or converted."""
        if self._progress and shard in self._sizes:
            with self._lock:
                self._ticked[shard] += count
                size = self._sizes[shard]
                self._progress(shard, min(self._ticked[shard] // self._passes[shard], size), size)

    def finish(self, shard: str) -> None:
        """Count all bytes of a shard."""
        if self._progress:
            self._progress(shard, self._sizes[shard], self._sizes[shard])


class FileProgress:
    """Turn counts of bytes that are written to a file into progress."""

    def __init__(self, name: str, size: int, progress: Progress | None) -> None:
        self._name, self._size, self._progress, self._done = name, size, progress, 0
        self.add(0)

    def add(self, count: int) -> None:
        """Count bytes that were written; those of a second attempt count no more than once."""
        self._done = min(self._done + count, self._size)
        if self._progress:
            self._progress(self._name, self._done, self._size)
