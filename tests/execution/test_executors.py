"""Jobs run at once, and end together when one fails."""

from __future__ import annotations

import threading
import time

import pytest

from paroquant_stream.errors import RunCancelledError, StoreError
from paroquant_stream.execution.threads import run_all


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_item_gives_one_result(jobs):
    assert sorted(run_all(lambda item, _: item * 2, [1, 2, 3, 4], jobs)) == [2, 4, 6, 8]


def test_at_most_so_many_run_at_once():
    running, most, lock = [], [], threading.Lock()

    def work(item, _):
        with lock:
            running.append(item)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(item)

    list(run_all(work, range(8), 2))
    assert max(most) == 2


def test_one_job_runs_in_the_calling_thread():
    main = threading.current_thread()
    assert list(run_all(lambda _item, _: threading.current_thread() is main, [1, 2], 1)) == [
        True,
        True,
    ]


def test_the_first_error_stops_the_others_and_is_raised():
    stopped = []

    def work(item, worker):
        if item == 0:
            time.sleep(0.05)
            raise StoreError("disk full")
        try:
            for _ in range(1000):
                worker.check()
                time.sleep(0.005)
        except RunCancelledError:
            stopped.append(item)
            raise

    started = time.monotonic()
    with pytest.raises(StoreError, match="disk full"):
        list(run_all(work, [0, 1, 2], 3))
    assert sorted(stopped) == [1, 2]
    assert time.monotonic() - started < 2


def test_a_caller_that_stops_listening_stops_the_jobs():
    started, ended = threading.Event(), threading.Event()

    def work(item, worker):
        if item == 0:
            started.wait(5)
            return item
        started.set()
        try:
            while True:
                worker.check()
                time.sleep(0.005)
        finally:
            ended.set()

    results = run_all(work, [0, 1], 2)
    assert next(results) == 0
    results.close()
    assert ended.is_set()


def test_an_error_ends_a_run_with_jobs_still_in_the_queue():
    def work(item, _):
        time.sleep(0.05)
        raise StoreError("disk full")

    started = time.monotonic()
    with pytest.raises(StoreError, match="disk full"):
        list(run_all(work, range(20), 2))
    assert time.monotonic() - started < 1
