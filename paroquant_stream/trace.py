"""Timing of the stages of a run, summed per stage and written as a Chrome trace.

`Trace.write` writes the JSON that chrome://tracing and ui.perfetto.dev open: one row per thread,
one slice per stage, nested stages below the one that contains them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .errors import UnwritableFileError


class Span(NamedTuple):  # a dataclass takes three times as long to import
    """One stage that one thread has finished."""

    stage: str
    detail: str
    """What the stage worked on, such as a shard's name."""
    thread: str
    start_ns: int
    stop_ns: int
    own_ns: int
    """Duration without the nested stages."""


class Trace:
    """Finished stages of all threads, in the order in which they ended."""

    def __init__(self, process: str = "") -> None:
        """Start the clock of the trace.

        Args:
            process: Stands for the names of threads in another process than that of the run.
        """
        self.spans: list[Span] = []
        self._process = process
        self._open = threading.local()
        self._started = time.perf_counter_ns()

    @contextmanager
    def span(self, stage: str, detail: object = "") -> Iterator[None]:
        """Record how long the body takes, also when it raises.

        Args:
            stage: Name of the stage; equal names are summed by `seconds`.
            detail: What the stage works on.
        """
        # one item per open stage of this thread: the time of the stages nested in it, in ns
        nested: list[int] = self._open.__dict__.setdefault("nested", [])
        nested.append(0)
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            stop = time.perf_counter_ns()
            own = stop - start - nested.pop()
            if nested:
                nested[-1] += stop - start
            name = self._process or threading.current_thread().name
            self.spans.append(Span(stage, str(detail), name, start, stop, own))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage, summed over the threads, without nested stages."""
        sums: dict[str, float] = defaultdict(float)
        for span in list(self.spans):
            sums[span.stage] += span.own_ns / 1e9
        return dict(sums)

    def write(self, path: str | Path) -> None:
        """Write the Chrome trace.

        Raises:
            UnwritableFileError: The file cannot be written.
        """
        spans = sorted(self.spans, key=lambda span: span.start_ns)
        rows = {name: row for row, name in enumerate(dict.fromkeys(s.thread for s in spans))}
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}}
            for name, row in rows.items()
        ]
        for span in spans:
            event = {"ph": "X", "pid": 1, "tid": rows[span.thread], "name": span.stage}
            start, duration = span.start_ns - self._started, span.stop_ns - span.start_ns
            events.append(
                event | {"ts": start / 1e3, "dur": duration / 1e3, "args": {"of": span.detail}}
            )
        try:
            Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise _unwritable(path, error) from error


class _NoTrace(Trace):
    """A trace that records nothing."""

    @contextmanager
    def span(self, stage: str, detail: object = "") -> Iterator[None]:
        yield


NO_TRACE = _NoTrace()
"""The trace of a run for which none is wanted."""


@contextmanager
def written_to(path: str | Path | None) -> Iterator[Trace]:
    """Yield a trace and write it after the body, also when the body raises.

    Args:
        path: The file to write; None yields `NO_TRACE` and writes nothing.

    Raises:
        UnwritableFileError: The file cannot be written; checked before the body too.
    """
    if path is None:
        yield NO_TRACE
        return
    trace = Trace()
    _check_writable(path)
    try:
        yield trace
    finally:
        trace.write(path)


def _check_writable(path: str | Path) -> None:
    """Raise UnwritableFileError before hours of work rather than after them."""
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: str | Path, error: OSError) -> UnwritableFileError:
    return UnwritableFileError(
        f"{os.fspath(path)}: the trace cannot be written: {error.strerror}; name another file"
    )
