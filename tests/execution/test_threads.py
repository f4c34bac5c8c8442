"""Jobs run concurrently, and all of them end when one fails or the caller stops."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from paroquant_stream.errors import ExecutionError, RunCancelledError, StoreError
from paroquant_stream.execution import threads
from paroquant_stream.execution.cancellation import Cancellation
from paroquant_stream.execution.threads import in_background, run_all, translate_refusals
from tests.helpers.processes import ENDS

LIMIT = 30  # seconds to wait for what happens at once; reached only by a failure


def run_until_cancelled(cancellation: Cancellation) -> None:
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        cancellation.check()
        time.sleep(0.001)


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_item_has_one_result(jobs):
    assert sorted(run_all(lambda item, _: item * 2, [1, 2, 3, 4], jobs)) == [2, 4, 6, 8]


def test_at_most_jobs_run_at_once():
    both = threading.Barrier(2, timeout=LIMIT)
    running, most, lock = set(), [], threading.Lock()

    def work(item, _):
        with lock:
            running.add(item)
            most.append(len(running))
        both.wait()  # passes only if two run at once
        with lock:
            running.remove(item)

    list(run_all(work, range(8), 2))
    assert max(most) == 2


def test_one_job_runs_in_the_calling_thread():
    main = threading.current_thread()
    assert all(run_all(lambda *_: threading.current_thread() is main, [1, 2], 1))


def test_one_item_runs_in_the_calling_thread():
    main = threading.current_thread()
    assert all(run_all(lambda *_: threading.current_thread() is main, [1], 4))


def test_what_runs_in_the_background_is_waited_for_by_nobody():
    go_on, ran = threading.Event(), threading.Event()

    def work() -> None:
        assert go_on.wait(LIMIT)
        ran.set()

    in_background(work, "work")
    (thread,) = [each for each in threading.enumerate() if each.name == "work"]
    assert thread.daemon
    go_on.set()  # passes only if the call has returned before
    assert ran.wait(LIMIT)


@pytest.mark.parametrize("error", [ImportError, SystemExit, KeyboardInterrupt])
def test_what_fails_in_the_background_is_no_error(error, capsys):
    def fail() -> None:
        raise error

    in_background(fail, "fail")
    for thread in threading.enumerate():
        if thread.name == "fail":
            thread.join(LIMIT)
    assert capsys.readouterr() == ("", "")


def test_without_a_thread_nothing_runs_in_the_background(monkeypatch):
    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    in_background(lambda: pytest.fail("called"), "work")


def test_the_first_error_cancels_the_others_and_is_raised():
    cancelled, running = [], threading.Barrier(3, timeout=LIMIT)

    def work(item, cancellation):
        running.wait()
        if item == 0:
            raise StoreError("disk full")
        try:
            run_until_cancelled(cancellation)
        except RunCancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(StoreError, match="disk full"):
        list(run_all(work, [0, 1, 2], 3))
    assert sorted(cancelled) == [1, 2]


def test_a_caller_that_closes_the_generator_stops_the_jobs():
    started, ended = threading.Event(), threading.Event()

    def work(item, cancellation):
        if item == 0:
            started.wait(LIMIT)
            return item
        started.set()
        try:
            run_until_cancelled(cancellation)
        finally:
            ended.set()

    results = run_all(work, [0, 1], 2)
    assert next(results) == 0
    results.close()
    assert ended.is_set()


def test_an_error_drops_the_jobs_in_the_queue():
    ran, both = [], threading.Barrier(2, timeout=LIMIT)

    def work(item, _):
        ran.append(item)
        both.wait()
        raise StoreError("disk full")

    with pytest.raises(StoreError, match="disk full"):
        list(run_all(work, range(20), 2))
    assert len(ran) == 2


def test_an_interrupt_drops_the_jobs_in_the_queue(monkeypatch):
    monkeypatch.setattr(threads, "INTERRUPT_TIMEOUT", 0.01)
    futures: list[Future] = []

    class Recording(ThreadPoolExecutor):
        def submit(self, *call):
            futures.append(super().submit(*call))
            return futures[-1]

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Recording)
    ran, ended, stuck = [], [], threading.Event()

    def work(item, _):
        ran.append(item)
        if item:
            stuck.wait(LIMIT)  # a system call that cannot be cut short
            ended.append(item)
        return item

    results = run_all(work, range(20), 2)
    assert next(results) == 0
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert not ended  # it returned although jobs are still running
    dropped = [future for future in futures if future.cancelled()]
    stuck.set()
    assert len(dropped) >= 17
    assert len(ran) <= 3


def test_the_end_of_a_run_stops_its_jobs_and_not_its_parent():
    parent, seen = Cancellation(), []
    list(run_all(lambda _, cancellation: seen.append(cancellation), [1, 2], 2, parent))
    parent.check()
    for cancellation in seen:
        with pytest.raises(RunCancelledError):
            cancellation.check()


def test_the_end_of_the_parent_stops_the_jobs():
    parent, cancelled = Cancellation(), []

    def work(item, cancellation):
        parent.stop()
        try:
            run_until_cancelled(cancellation)
        except RunCancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(RunCancelledError):
        list(run_all(work, [0, 1], 2, parent))
    assert cancelled
    with pytest.raises(RunCancelledError):
        list(run_all(work, [2], 1, parent))
    assert 2 in cancelled


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("can't start new thread", r"\(`--jobs 1`\).*`ulimit -u`"),
        ("cannot schedule new futures after interpreter shutdown", "`Thread.join`"),
        ("can't create new thread at interpreter shutdown", "`Thread.join`"),  # since Python 3.12
        ("can't register atexit after shutdown", "`Thread.join`"),  # importing concurrent.futures
    ],
)
def test_a_thread_that_cannot_start_is_one_line(monkeypatch, reason, advice):
    def refuse(_thread):
        raise RuntimeError(reason)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ExecutionError, match=advice) as found:
        list(run_all(lambda *_: None, [1, 2, 3], 2))
    assert "\n" not in str(found.value)


def test_another_error_of_starting_is_a_defect():
    with pytest.raises(RuntimeError, match="after shutdown"), translate_refusals():
        raise RuntimeError("cannot schedule new futures after shutdown")


def test_a_program_that_ends_while_a_thread_converts_says_so(model_dir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(model_dir), str(tmp_path / "cache")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the program ended while a thread of it was converting; let")
    assert done.stdout.count("\n") == 1
