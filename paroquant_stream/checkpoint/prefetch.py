"""Prefetches absent shards in background threads while a conversion runs.

Two threads fetch the shards in the order in which the tasks need them, each shard once. A task
waits until its own shard and those that it borrows from exist. With a limit, a shard is fetched
only when the first task that needs it is at most so many tasks ahead of the finished ones. The
first unfinished task is never ahead, so its shards are always being fetched: there is no deadlock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ..errors import CheckpointError, ParoquantStreamError, RunCancelledError
from ..files.tensor_header import Header
from .shard import Shard

FETCHERS = 2  # so that the network is busy while one request waits for its response
POLL = 0.1  # s between two checks whether the run was cancelled
_EXIT_TIMEOUT = 1.0  # s that the end of a run waits for the fetchers to remove their temp files


class Remote(Protocol):
    """Where the absent shards of a model are downloaded from."""

    def headers(self, shards: Sequence[str]) -> dict[str, Header]:
        """Read the validated headers of these shards without their tensors."""

    def fetch(self, shard: str, tick: Callable[[int], None]) -> None:
        """Download a shard into the model directory.

        Args:
            shard: Its name.
            tick: Called with the bytes of each chunk; may raise to stop the download.
        """


class Prefetcher:
    """Fetches absent shards inside its `with` block."""

    def __init__(
        self,
        remote: Remote | None,
        directory: Path,
        needs: Sequence[Sequence[str]],
        headers: Mapping[str, Header],
        tick: Callable[[str, int], None],
        ahead: int | None = None,
    ) -> None:
        """Set up the queue of shards.

        Args:
            remote: Where shards come from; None if none is absent.
            directory: The model directory.
            needs: For each task, in order, the absent shards that it reads.
            headers: Shard name -> the header that the plan was made with.
            tick: Called with shard name and bytes of each downloaded chunk.
            ahead: How many tasks ahead shards are fetched; None for no limit.
        """
        self._remote, self._directory, self._headers = remote, directory, headers
        self._report, self._ahead = tick, ahead
        first_need: dict[str, int] = {}
        for index, shards in enumerate(needs):
            for shard in shards:
                first_need.setdefault(shard, index)
        self._queue = list(first_need.items())  # in the order of first need
        self._absent = set(first_need)
        self._fetching: set[str] = set()
        self._finished = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Prefetcher:
        if self._remote:
            for _ in range(min(FETCHERS, len(self._queue))):
                # daemons, so that a hanging socket does not keep the process from exiting
                self._threads.append(threading.Thread(target=self._fetch_all, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        until = time.monotonic() + _EXIT_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def wait_for(self, shards: Iterable[str], check: Callable[[], None]) -> None:
        """Wait until all of these shards exist.

        Args:
            shards: Names; a shard that was not absent needs no waiting.
            check: Called every `POLL` seconds; may raise to stop waiting.

        Raises:
            ParoquantStreamError: One of the shards cannot be fetched.
        """
        wanted = set(shards)
        with self._changed:
            while missing := wanted & self._absent:
                if self._error and not missing <= self._fetching:
                    raise self._error
                self._changed.wait(POLL)
                check()

    def finish_task(self) -> None:
        """Count one more task as finished, so that the next shards may be fetched."""
        with self._changed:
            self._finished += 1
            self._changed.notify_all()

    def _fetch_all(self) -> None:
        while shard := self._next():
            try:
                assert self._remote
                self._remote.fetch(shard, partial(self._tick, shard))
                self._check_header(shard)
                error: BaseException | None = None
            except ParoquantStreamError as raised:
                error = raised
            except BaseException as raised:  # else a task would wait for this shard forever
                error = CheckpointError(f"{self._directory / shard}: cannot be fetched: {raised}")
            with self._changed:
                self._fetching.discard(shard)
                if error:
                    self._error = self._error or error
                else:
                    self._absent.discard(shard)
                self._changed.notify_all()

    def _next(self) -> str | None:
        """Wait until the next shard may be fetched and return it; None at the end."""
        with self._changed:
            while self._queue and not self._error and not self._stopped:
                shard, task = self._queue[0]
                if self._ahead is None or task <= self._finished + self._ahead:
                    self._fetching.add(shard)
                    return self._queue.pop(0)[0]
                self._changed.wait()
            return None

    def _tick(self, shard: str, count: int) -> None:
        if self._stopped:
            raise RunCancelledError("the run ended before this shard was downloaded")
        self._report(shard, count)

    def _check_header(self, shard: str) -> None:
        found = Shard(shard, self._directory / shard).header()
        if found != self._headers.get(shard, found):  # absent if another run has just dropped it
            raise CheckpointError(
                f"{self._directory / shard}: the header differs from the one that the Hub sent "
                "before the download; remove the file and run again"
            )
