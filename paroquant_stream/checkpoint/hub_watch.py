"""Runs calls of the Hub's client in background threads and ends those that receive too little.

    caller         waits, checks each call every 0.1 s --------------> the results, or one error
    daemon thread  the Hub's client -- session hooks, progress bar --> Watch: bytes received

The client limits only the wait for the next byte and reads 10 MB at a time, so a server that sends
a byte a second blocks it for years while its progress bar stands still; the response object counts
the bytes. The connection of a stopped call is shut down once it is known, from the headers of the
response; until then the thread stays, a daemon that does not keep the process from exiting.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import CheckpointError, RunCancelledError
from ..text import bytes_text

T = TypeVar("T")

MIN_RATE = 1_000  # bytes/s
WINDOW = 30.0  # s over which the rate is measured
XET_WINDOW = 120.0  # s; the Rust client reports to the bar alone, and not while it writes to a disk
RETRY_WINDOW = 600.0  # s that the Hub may ask a client to wait; its rate limits last 5 minutes
POLL = 0.1  # s between two checks
MAX_CALLS = 8  # at once
_EXIT_TIMEOUT = 1.0  # s that stopped calls have to remove their temp files
_LOGGERS = ("huggingface_hub.file_download", "huggingface_hub.utils._http")
_current = threading.local()
_stopped_calls: dict[str, threading.Thread] = {}
"""Label -> thread of stopped calls that may still hold the lock of their file."""


class Watch:
    """The progress of one call of the Hub's client, for a thread that checks its rate."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.error: BaseException | None = None
        """What a progress bar raised; the Rust client's threads discard it."""
        self.stopped = False
        """Whether the call was stopped."""
        self._requests = 0
        self._response: Any = None
        self._bars = self._bar_bytes = 0
        self._phase: tuple[Any, ...] = ()
        self._waited, self._received = 0.0, 0

    def request(self) -> None:
        """Record that a request is sent.

        Raises:
            RunCancelledError: The call was stopped.
        """
        if self.stopped:
            raise RunCancelledError(f"{self.label}: stopped")
        self._requests, self._response = self._requests + 1, None

    def response(self, response: Any) -> None:
        """Record the response to the last request, whose body may still be arriving."""
        self._response = response

    def bar(self, tick: Callable[[int], None], limit: int | None) -> type:
        """Return a progress bar class for this call that counts bytes and shows nothing.

        Args:
            tick: Called with the bytes of each chunk; may raise to end the call.
            limit: The most bytes that the file may have; None for no limit.
        """
        watch = self

        class Bar(_Bar):
            def __init__(self, *_: Any, total: Any = None, **__: Any) -> None:
                self.total, self.n, self._open = total or 0, 0, True
                watch._bars += 1
                watch._check_size(self.total, limit)

            def update(self, n: float | None = 1) -> None:
                self.n += int(n or 0)
                watch._bar_bytes += int(n or 0)
                watch._check_size(self.n, limit)
                try:
                    tick(int(n or 0))
                except BaseException as error:
                    watch.error = error
                    raise

            def update_transfer(self, n: float | None = 1) -> None:
                watch._bar_bytes += int(n or 0)

            def close(self) -> None:
                watch._bars -= self._open
                self._open = False

        return Bar

    def check(self, seconds: float) -> None:
        """Check the rate of the call.

        Args:
            seconds: The time since the last check.

        Raises:
            CheckpointError: Less than `MIN_RATE` was received over a whole window.
        """
        if self.error:
            raise self.error
        phase, window = self._state()
        received = self._bar_bytes + (self._response.num_bytes_downloaded if self._response else 0)
        if phase != self._phase or received < self._received:
            self._phase, self._waited, self._received = phase, 0.0, received
            return
        self._waited += min(seconds, 1.0)  # time in which the process was suspended does not count
        if self._waited < window:
            return
        if received - self._received < MIN_RATE * WINDOW:
            raise CheckpointError(
                f"{self.label}: received {bytes_text(received - self._received)} from the Hub in "
                f"{self._waited:.0f} s, less than {bytes_text(MIN_RATE)}/s; run again later"
            )
        self._waited, self._received = 0.0, received

    def stop(self) -> None:
        """Allow no further request and shut down the connection of the running one."""
        import socket  # 4 ms, for models from the Hub alone

        self.stopped = True
        response = self._response
        if response is not None and not response.is_closed:  # else others use its connection
            with contextlib.suppress(Exception):  # transports differ, and it may be closed by now
                stream = response.extensions["network_stream"]
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def _state(self) -> tuple[tuple[Any, ...], float]:
        """Return what the call is waiting for and the window for that, in seconds."""
        response = self._response
        if self._requests and (response is None or not response.is_closed):
            return ("request", self._requests), WINDOW
        if self._bars:
            return ("xet",), XET_WINDOW
        if response is not None and response.status_code >= 400:
            return ("retry", self._requests), RETRY_WINDOW
        return (), float("inf")  # perhaps for a lock while another process downloads

    def _check_size(self, size: int, limit: int | None) -> None:
        if limit is not None and size > limit:
            self.error = CheckpointError(
                f"{self.label}: over {bytes_text(limit)}, which no model needs; not downloaded"
            )
            raise self.error


class _Bar:
    """The methods of a progress bar that have no effect."""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def run_calls(calls: Sequence[tuple[str, Callable[[Watch], T]]]) -> list[T]:
    """Run calls of the Hub's client, at most `MAX_CALLS` at once, in a bounded time.

    Args:
        calls: For each call its label, for errors, and a function, which gets its watch.

    Returns:
        Their results, in order.

    Raises:
        CheckpointError: A call receives too little, or an earlier call of its label still hangs.
    """
    for label, _ in calls:
        _wait_for_stopped(label)
    jobs = [_Job(label, call) for label, call in calls]
    waiting, changed = iter(jobs), threading.Condition()
    threads = [
        threading.Thread(target=_work, args=(waiting, changed), name="hub-call", daemon=True)
        for _ in range(min(MAX_CALLS, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    try:
        _watch(jobs, changed)
    except BaseException:
        with changed:
            for _ in waiting:  # empty it, so that no thread starts another call
                pass
        for job in jobs:
            job.watch.stop()
        until = time.monotonic() + _EXIT_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        _stopped_calls.update((j.watch.label, j.thread) for j in jobs if j.thread and not j.done)
        raise
    return [job.result for job in jobs]


class _Job:
    """One call with its watch, its thread once it has started, and its result."""

    def __init__(self, label: str, call: Callable[[Watch], Any]) -> None:
        self.watch, self.call = Watch(label), call
        self.thread: threading.Thread | None = None
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the call in this thread."""
        _current.watch = self.watch
        try:
            _install_hooks()
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
    """Wait until all jobs are done, or raise the first error of a job or watch."""
    checked = time.monotonic()
    with changed:
        while True:
            for job in jobs:
                if job.error:
                    raise job.error
            if all(job.done for job in jobs):
                return
            changed.wait(POLL)
            passed, checked = time.monotonic() - checked, time.monotonic()
            for job in jobs:
                if job.thread and not job.done:
                    job.watch.check(passed)
            _install_hooks()  # the client makes a new session after a connection error


def _wait_for_stopped(label: str) -> None:
    """Wait for the thread of a stopped call of this label, which holds the lock of its file."""
    if thread := _stopped_calls.get(label):
        thread.join(WINDOW)
        if thread.is_alive():
            raise CheckpointError(
                f"{label}: a stopped request to the Hub still hangs in this process; restart it"
            )
        _stopped_calls.pop(label, None)


def _install_hooks() -> None:
    """Add the hooks to the process's Hub session; they affect the threads of calls only."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _on_request not in hooks["request"]:
        hooks["request"].append(_on_request)
        hooks["response"].append(_on_response)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_current)  # a second addition has no effect


def _is_current(_record: logging.LogRecord) -> bool:
    """Return whether to log a record: the errors of a stopped call are expected."""
    watch = getattr(_current, "watch", None)
    return not (watch and watch.stopped)


def _on_request(_request: Any) -> None:
    if watch := getattr(_current, "watch", None):
        watch.request()


def _on_response(response: Any) -> None:
    if watch := getattr(_current, "watch", None):
        watch.response(response)
