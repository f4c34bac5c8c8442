"""How far a conversion is: bars on a terminal, one line per shard in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

from ..text import bytes_text, shown


class Progress:
    """Show progress; called with a shard's name, its finished source bytes and its size.

    May be called from any thread, and is first called with 0 for every shard that needs work. On a
    terminal it shows a bar for all shards, with rate and time left, and below it one for each shard
    that is being converted; elsewhere a line on stderr when a shard is done; nothing when `quiet`.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._done: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._total: Any = None
        self._bars: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, shard: str, done: int, size: int) -> None:
        """Show that `done` of the `size` bytes of a shard are done."""
        with self._lock:
            before = self._done.get(shard, 0)
            self._done[shard], self._sizes[shard] = max(done, before), size
            if self._quiet or done < before:
                return
            if self._terminal:
                self._draw(shard, done, size)
            elif before < size <= done:
                self._write_line(shard)

    def say(self, line: str) -> None:
        """Print a line on stdout, on a terminal above the bars."""
        with self._lock:
            for bar in (*self._bars.values(), self._total):
                if bar is not None:
                    bar.clear()
            print(line)

    def _write_line(self, shard: str) -> None:
        finished = sum(self._done[name] >= size for name, size in self._sizes.items())
        done, size = sum(self._done.values()), max(sum(self._sizes.values()), 1)
        rate = done / max(time.monotonic() - self._started, 1e-3)
        print(
            f"{shown(shard)} done: {finished} of {len(self._sizes)} shards, "
            f"{100 * done // size} %, {bytes_text(int(rate))}/s",
            file=sys.stderr,
        )

    def _draw(self, shard: str, done: int, size: int) -> None:
        if self._total is None:
            self._total = _bar("all shards", 0, 0)
        self._total.total = sum(self._sizes.values())
        self._total.update(sum(self._done.values()) - self._total.n)
        if 0 < done < size and shard not in self._bars:
            taken = {bar.pos for bar in self._bars.values()}  # negative, as tqdm counts
            place = next(p for p in range(1, len(taken) + 2) if -p not in taken)
            self._bars[shard] = _bar(shown(shard), size, place)
        if shard in self._bars:
            self._bars[shard].update(done - self._bars[shard].n)
            if done >= size:
                self._bars.pop(shard).close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            for bar in (*self._bars.values(), self._total):
                if bar is not None:
                    bar.close()
            self._quiet = True  # workers that are still running after an interrupt


def _bar(name: str, size: int, place: int) -> Any:
    from tqdm import tqdm  # here, because a run without work shows no bar

    return tqdm(desc=name, total=size, position=place, unit="B", unit_scale=True, leave=False)
