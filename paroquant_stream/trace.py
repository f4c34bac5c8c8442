"""Where the time goes: the stages of every worker, as sums and as a Chrome trace.

`Trace.write` makes the JSON that chrome://tracing and ui.perfetto.dev open: one row a thread, one
slice a stage, a stage inside another below it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import UnwritableFileError


@dataclass(frozen=True)
class Span:
    """One stage of one thread."""

    stage: str
    detail: str
    thread: str
    start_ns: int
    stop_ns: int
    own_ns: int
    """Without the stages inside it."""


class Trace:
    """Stages as they end, from any thread; about 2 us each."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._open = threading.local()
        self._started = time.perf_counter_ns()

    @contextmanager
    def span(self, stage: str, detail: object = "") -> Iterator[None]:
        """Times the body as `stage`; `detail` says of what."""
        above: list[int] = self._open.__dict__.setdefault("inside", [])  # ns of the stages inside
        above.append(0)
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            stop = time.perf_counter_ns()
            own = stop - start - above.pop()
            if above:
                above[-1] += stop - start
            name = threading.current_thread().name
            self.spans.append(Span(stage, str(detail), name, start, stop, own))

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage, summed over the threads, without the stages inside it."""
        sums: dict[str, float] = defaultdict(float)
        for span in list(self.spans):
            sums[span.stage] += span.own_ns / 1e9
        return dict(sums)

    def write(self, path: str | Path) -> None:
        """Writes the Chrome trace. Raises UnwritableFileError."""
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
            raise UnwritableFileError(
                f"{os.fspath(path)}: the trace cannot be written: {error.strerror}"
            ) from error


class _Silence(Trace):
    """Times nothing."""

    @contextmanager
    def span(self, stage: str, detail: object = "") -> Iterator[None]:
        yield


SILENCE = _Silence()
"""The trace of a run that nobody looks at."""


@contextmanager
def written_to(path: str | Path | None) -> Iterator[Trace]:
    """A trace that is written to `path` when the body ends, also by an error; `SILENCE` for
    None.
    """
    if path is None:
        yield SILENCE
        return
    trace = Trace()
    try:
        yield trace
    finally:
        trace.write(path)
