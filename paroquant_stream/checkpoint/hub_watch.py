"""Calls of the Hub's client in threads of their own, given up when next to nothing arrives.

    caller:  waits, and looks at each call every 0.1 s ------------------> the results, or one error
    daemon:  the Hub's client -- hooks of its session, its bar --> Watch: how many bytes have come

The client bounds the wait for the next byte and reads 10 MB at a time, so a server that sends one
byte a second holds it for years, and its bar shows nothing meanwhile. A response tells from outside
how much it has received. A call that is given up has its connection shut; while it still waits for
the head of an answer it has none that could be, and its thread stays, as a daemon: it cannot keep
the process from ending.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import CheckpointError, RunCancelledError

T = TypeVar("T")

SLOWEST = 1_000  # bytes a second: half of what a modem of 1991 brought
WINDOW = 30.0  # s over which that is measured
XET_WINDOW = 120.0  # s; its Rust client tells the bar alone, and nothing while it writes to a disk
PAUSE = 600.0  # s for which the Hub may ask a client to wait; its limits count in 5 minutes
POLL = 0.1  # s between two looks
TOGETHER = 8  # calls at once
_LEAVE = 1.0  # s that calls have to remove their temps once they are given up
_LOGGERS = ("huggingface_hub.file_download", "huggingface_hub.utils._http")
_current = threading.local()
_left: dict[str, threading.Thread] = {}
"""Calls that were given up and whose thread may still hold the lock of its file."""


class Watch:
    """What one call of the Hub's client is doing, as its hooks and bars tell another thread."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.error: BaseException | None = None
        """What a bar raised; in a thread of the Rust client nobody else would see it."""
        self.stopped = False
        """Whether the call was given up."""
        self._requests = 0
        self._response: Any = None
        self._bars = self._told = 0
        self._phase: tuple[Any, ...] = ()
        self._waited, self._before = 0.0, 0

    def request(self) -> None:
        """Note that a request is sent. Raises RunCancelledError once the call was given up."""
        if self.stopped:
            raise RunCancelledError(f"{self.label}: given up")
        self._requests, self._response = self._requests + 1, None

    def answer(self, response: Any) -> None:
        """Note the answer to the last request, whose body may still be on its way."""
        self._response = response

    def bar(self, tick: Callable[[int], None], limit: int | None) -> type:
        """Make a class that the Hub's client takes for a progress bar, for this one call.

        Args:
            tick: Called with the bytes of each piece; may raise to end the call.
            limit: The most bytes that the file may have.

        Returns:
            The class; its bars show nothing.
        """
        watch = self

        class Bar(_Bar):
            def __init__(self, *_: Any, total: Any = None, **__: Any) -> None:
                self.total, self.n, self._open = total or 0, 0, True
                watch._bars += 1
                watch._check_size(self.total, limit)

            def update(self, n: float | None = 1) -> None:
                self.n += int(n or 0)
                watch._told += int(n or 0)
                watch._check_size(self.n, limit)
                try:
                    tick(int(n or 0))
                except BaseException as error:
                    watch.error = error
                    raise

            def update_transfer(self, n: float | None = 1) -> None:
                watch._told += int(n or 0)

            def close(self) -> None:
                watch._bars -= self._open
                self._open = False

        return Bar

    def look(self, seconds: float) -> None:
        """Look at the call after so many seconds.

        Raises:
            CheckpointError: Less has arrived than a line of `SLOWEST` brings.
        """
        if self.error:
            raise self.error
        phase, patience = self._state()
        received = self._told + (self._response.num_bytes_downloaded if self._response else 0)
        if phase != self._phase or received < self._before:
            self._phase, self._waited, self._before = phase, 0.0, received
            return
        self._waited += min(seconds, 1.0)  # time in which the process was stopped does not count
        if self._waited < patience:
            return
        if received - self._before < SLOWEST * WINDOW:
            raise CheckpointError(
                f"{self.label}: the Hub sent {received - self._before:,} bytes in "
                f"{self._waited:.0f} s, less than {SLOWEST:,} a second; run again when it is faster"
            )
        self._waited, self._before = 0.0, received

    def stop(self) -> None:
        """Give the call up: no further request, and the end of the one that is answered."""
        import socket  # 4 ms, for models from the Hub alone

        self.stopped = True
        response = self._response
        if response is not None and not response.is_closed:  # else its connection serves others
            with contextlib.suppress(Exception):  # it may be of any kind, and gone by now
                stream = response.extensions["network_stream"]
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def _state(self) -> tuple[tuple[Any, ...], float]:
        """What the call is waiting for, and for how long it may."""
        response = self._response
        if self._requests and (response is None or not response.is_closed):
            return ("request", self._requests), WINDOW
        if self._bars:
            return ("xet",), XET_WINDOW
        if response is not None and response.status_code >= 400:
            return ("told to wait", self._requests), PAUSE
        return (), float("inf")  # for a lock, perhaps, while another process downloads

    def _check_size(self, size: int, limit: int | None) -> None:
        if limit is not None and size > limit:
            self.error = CheckpointError(
                f"{self.label}: over {limit >> 20} MiB, which no model needs; it was not downloaded"
            )
            raise self.error


class _Bar:
    """What a progress bar has beside what counts here."""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to close."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def together(calls: Sequence[tuple[str, Callable[[Watch], T]]]) -> list[T]:
    """Make calls of the Hub's client, some at once, and end in a bounded time.

    Args:
        calls: For each what it is called in errors, and the call, which gets its watch.

    Returns:
        Their results, in order.

    Raises:
        CheckpointError: Next to nothing arrives, or an earlier call of this name still hangs.
    """
    for label, _ in calls:
        _await_left(label)
    jobs = [_Job(label, call) for label, call in calls]
    waiting, changed = iter(jobs), threading.Condition()
    threads = [
        threading.Thread(target=_work, args=(waiting, changed), name="hub-call", daemon=True)
        for _ in range(min(TOGETHER, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    try:
        _watch(jobs, changed)
    except BaseException:
        with changed:
            for _ in waiting:  # no thread begins another
                pass
        for job in jobs:
            job.watch.stop()
        until = time.monotonic() + _LEAVE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        _left.update((j.watch.label, j.thread) for j in jobs if j.thread and not j.done)
        raise
    return [job.result for job in jobs]


class _Job:
    """One call: its watch, its thread once it has begun, and what came of it."""

    def __init__(self, label: str, call: Callable[[Watch], Any]) -> None:
        self.watch, self.call = Watch(label), call
        self.thread: threading.Thread | None = None
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call in this thread."""
        _current.watch = self.watch
        try:
            _listen()
            self.result = self.call(self.watch)
        except BaseException as error:  # raised again by the caller
            self.error = error
        _current.watch = None


def _work(waiting: Iterator[_Job], changed: threading.Condition) -> None:
    while True:
        with changed:
            job = next(waiting, None)
            if job is None:
                return
            job.thread = threading.current_thread()
        job.run()
        with changed:
            job.done = True
            changed.notify_all()


def _watch(jobs: Sequence[_Job], changed: threading.Condition) -> None:
    """Returns when all jobs are done; raises the first error, or that of a watch."""
    looked = time.monotonic()
    with changed:
        while True:
            for job in jobs:
                if job.error:
                    raise job.error
            if all(job.done for job in jobs):
                return
            changed.wait(POLL)
            passed, looked = time.monotonic() - looked, time.monotonic()
            for job in jobs:
                if job.thread and not job.done:
                    job.watch.look(passed)
            _listen()  # after a connection that failed, the client takes a new session


def _await_left(label: str) -> None:
    """Waits for the thread of an earlier call that was given up: it holds the lock of its file."""
    thread = _left.get(label)
    if thread is None:
        return
    thread.join(WINDOW)
    if thread.is_alive():
        raise CheckpointError(
            f"{label}: an earlier request to the Hub still hangs in this process; start it anew"
        )
    _left.pop(label, None)


def _listen() -> None:
    """Adds our hooks to the session that all of this process share; they are for our threads."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _on_request not in hooks["request"]:
        hooks["request"].append(_on_request)
        hooks["response"].append(_on_response)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_has_to_say)  # added once, however often


def _has_to_say(_record: logging.LogRecord) -> bool:
    """Whether what the client logs is news: of a call that was given up it says that it failed."""
    watch = getattr(_current, "watch", None)
    return not (watch and watch.stopped)


def _on_request(_request: Any) -> None:
    watch = getattr(_current, "watch", None)
    if watch:
        watch.request()


def _on_response(response: Any) -> None:
    watch = getattr(_current, "watch", None)
    if watch:
        watch.answer(response)
