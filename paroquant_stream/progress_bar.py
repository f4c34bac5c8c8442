"""How far a conversion or an export is: bars on a terminal, one line per file in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from .text import bytes_text, shown

Report = Callable[[str, int, int], None]
"""Called with the name of a shard or file, its finished bytes and its size."""
SHARDS, FILES = "all shards", "all files"
"""Titles of the phases: what is converted, and what is written."""


@contextmanager
def reported(progress: Report | bool | None) -> Iterator[Callable[[str], Report | None]]:
    """Show during a `with` block what the caller of a function asked to see.

    Args:
        progress: A function of the caller's; True for bars, or lines where stderr is no terminal;
            False for nothing; None for bars on a terminal or in a notebook, else nothing.

    Yields:
        A function from the title of a phase to what is called in that phase, or None.
    """
    if not isinstance(progress, bool) and progress is not None:
        report = progress  # narrowed, for the lambda
        yield lambda _: report
    elif progress or (progress is None and (_on_terminal() or _in_notebook())):
        with Progress() as bars:
            yield bars.phase
    else:
        yield lambda _: None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _in_notebook() -> bool:
    """Tell whether this is the kernel of a notebook, which shows a line that is drawn again."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


class Progress:
    """Show progress; called with a shard's name, its finished source bytes and its size.

    May be called from any thread, and is first called with 0 for every shard that needs work. On a
    terminal it shows a bar for all shards, with rate and time left, and below it one for each shard
    that is being converted; in a notebook the first alone; elsewhere a line on stderr when a shard
    is done; nothing when `quiet`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._notebook = quiet or sys.stderr is None, _in_notebook()
        self._terminal = self._notebook or _on_terminal()
        self._title = SHARDS
        self._forget()
        self._lock = threading.Lock()

    def _forget(self) -> None:
        self._done: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._total: Any = None
        self._bars: dict[str, Any] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def phase(self, title: str) -> Report:
        """Return what is called in a phase; its first call ends the phase before."""
        return partial(self._report, title)

    def _report(self, title: str, shard: str, done: int, size: int) -> None:
        with self._lock:
            if title != self._title:
                self._close()
                self._forget()
                self._title = title
        self(shard, done, size)

    def _close(self) -> None:
        for bar in (*self._bars.values(), self._total):
            if bar is not None:
                bar.close()

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
            f"{shown(shard)} done: {finished} of {len(self._sizes)} {self._title.split()[-1]}, "
            f"{100 * done // size} %, {bytes_text(int(rate))}/s",
            file=sys.stderr,
        )

    def _draw(self, shard: str, done: int, size: int) -> None:
        if self._total is None:
            self._total = _bar(self._title, 0, 0)
        self._total.total = sum(self._sizes.values())
        self._total.update(sum(self._done.values()) - self._total.n)
        if 0 < done < size and shard not in self._bars and not self._notebook:
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
            self._close()
            self._quiet = True  # workers that are still running after an interrupt


def _bar(name: str, size: int, place: int) -> Any:
    from tqdm import tqdm  # here, because a run without work shows no bar

    return tqdm(desc=name, total=size, position=place, unit="B", unit_scale=True, leave=False)
