"""Shards that are still on their way: who brings them, and how a conversion waits for them.

Two threads fetch in the order in which the tasks need the shards, each shard once. A job waits
until its own shard and those that it borrows from are there. With a bound, a shard is fetched only
when the task that needs it first is at most so many tasks ahead; the first unfinished task is never
ahead, so its shards are always on their way and nothing can wait for itself.
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

FETCHERS = 2  # one more than is converted, so that the line is busy while a request is answered
POLL = 0.1  # s between two looks at whether the run was told to stop
_PATIENCE = 1.0  # s that an ended run waits for fetchers to remove their temps


class Remote(Protocol):
    """Where the shards of a model are that are not in its directory yet."""

    def headers(self, shards: Sequence[str]) -> dict[str, Header]:
        """The validated headers of these shards, without their tensors."""

    def fetch(self, shard: str, tick: Callable[[int], None]) -> None:
        """Brings a shard into the model directory.

        Calls `tick(bytes)` after every chunk, which may raise to stop.
        """


class Arrivals:
    """The shards that a conversion still has to fetch; a context in which they are fetched."""

    def __init__(
        self,
        remote: Remote | None,
        directory: Path,
        needs: Sequence[Sequence[str]],
        headers: Mapping[str, Header],
        tick: Callable[[str, int], None],
        ahead: int | None = None,
    ) -> None:
        """`needs`: for each task in order the absent shards that it reads. `headers`: as planned.

        `tick(shard, bytes)` follows what is downloaded. `ahead`: the bound, in tasks.
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

    def __enter__(self) -> Arrivals:
        if self._remote:
            for _ in range(min(FETCHERS, len(self._queue))):
                # daemons, as a socket that hangs must not keep the process from ending
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
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def wait_for(self, shards: Iterable[str], checkpoint: Callable[[], None]) -> None:
        """Returns when all of `shards` are there; `checkpoint()` may raise meanwhile.

        Raises the error that kept one of them from coming.
        """
        wanted = set(shards)
        with self._changed:
            while missing := wanted & self._absent:
                if self._error and not missing <= self._fetching:
                    raise self._error
                self._changed.wait(POLL)
                checkpoint()

    def finish_task(self) -> None:
        """Tells that one more task is done, so that the next shards may be fetched."""
        with self._changed:
            self._finished += 1
            self._changed.notify_all()

    def _fetch_all(self) -> None:
        while shard := self._next():
            try:
                assert self._remote
                self._remote.fetch(shard, partial(self._tick, shard))
                self._check(shard)
                error: BaseException | None = None
            except ParoquantStreamError as raised:
                error = raised
            except BaseException as raised:  # else a job would wait for this shard for ever
                error = CheckpointError(f"{self._directory / shard}: cannot be fetched: {raised}")
            with self._changed:
                self._fetching.discard(shard)
                if error:
                    self._error = self._error or error
                else:
                    self._absent.discard(shard)
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The next shard to fetch, as soon as it may be fetched; None when there is no more."""
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
            raise RunCancelledError("the run ended before this shard had arrived")
        self._report(shard, count)

    def _check(self, shard: str) -> None:
        found = Shard(shard, self._directory / shard).header()
        if found != self._headers.get(shard, found):  # unknown: dropped meanwhile by another run
            raise CheckpointError(
                f"{self._directory / shard}: its header is not the one that the Hub gave before "
                "the download; remove the file and run again"
            )
