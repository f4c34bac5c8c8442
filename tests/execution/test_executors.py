"""Calls on an executor: results, errors, cancellation, and checks of the workers."""

from __future__ import annotations

import threading
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from multiprocessing import get_context

import pytest

from paroquant_stream.errors import (
    ExecutionError,
    RunCancelledError,
    StoreError,
    WorkersLostError,
    WorkersUnfitError,
)
from paroquant_stream.execution import executors
from paroquant_stream.execution.executors import call_all, check_workers, worker_count


def never() -> None:
    """Cancel nothing."""


def call(executor: Executor, check, function, *arguments):
    """Call a function once, as one of many calls."""
    (result,) = call_all(executor, check, function, [arguments], lambda: 1)
    return result


class Failing(Executor):
    """An executor whose calls end with this error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def submit(self, *_call, **_options) -> Future:
        future: Future = Future()
        future.set_exception(self.error)
        return future


class Idle(Executor):
    """An executor that starts no call."""

    def __init__(self) -> None:
        self.futures: list[Future] = []

    def submit(self, *_call, **_options) -> Future:
        self.futures.append(Future())
        return self.futures[-1]


def test_the_result_of_the_function_is_returned():
    with ThreadPoolExecutor(1) as pool:
        assert call(pool, never, divmod, 7, 2) == (3, 1)


@pytest.mark.parametrize("error", [StoreError("disk full"), ValueError("7")])
def test_an_error_of_the_function_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        call(Failing(error), never, len, "")
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        BrokenExecutor("a process ended"),
        CancelledError(),
        ImportError("no module", name="paroquant_stream.transform"),
    ],
)
def test_an_error_of_the_executor_is_workers_lost(error):
    with pytest.raises(WorkersLostError, match=r"the executor or its workers failed .*to resume"):
        call(Failing(error), never, len, "")


def test_an_import_error_of_the_job_is_the_jobs_own():
    with pytest.raises(ImportError, match="no module"):
        call(Failing(ImportError("no module", name="mlx")), never, len, "")


def test_an_executor_that_was_shut_down_raises_its_own_error():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        call(pool, never, len, "")


def test_a_cancelled_run_cancels_its_call(monkeypatch):
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.001)
    pool, checks = Idle(), []

    def check():
        checks.append(1)
        if len(checks) == 3:
            raise RunCancelledError("stopped")

    with pytest.raises(RunCancelledError):
        call(pool, check, len, "")
    assert pool.futures[0].cancelled()


def test_the_check_is_called_while_the_function_runs(monkeypatch):
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.001)
    checked = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        assert call(pool, checked.set, checked.wait, 30)


def test_the_worker_count_is_that_of_the_pool():
    with ThreadPoolExecutor(3) as pool:
        assert worker_count(pool) == 3


def test_the_worker_count_of_another_executor_is_unknown():
    assert worker_count(Idle()) is None


def test_a_forking_pool_is_refused():
    with (
        ProcessPoolExecutor(1, get_context("fork")) as pool,
        pytest.raises(WorkersUnfitError, match=r"get_context\('spawn'\)"),
    ):
        check_workers(pool, [])


def test_threads_and_spawned_processes_are_accepted():
    with ThreadPoolExecutor(1) as pool:
        check_workers(pool, [])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        check_workers(pool, [])


def test_every_call_has_a_result():
    with ThreadPoolExecutor(3) as pool:
        calls = [(number, 7) for number in range(20)]
        found = call_all(pool, never, divmod, calls, lambda: 4)
        assert sorted(found) == sorted(divmod(*each) for each in calls)


def test_only_so_many_calls_are_on_the_executor_as_asked_for():
    now, most, lock = [], [], threading.Lock()

    class Recording(ThreadPoolExecutor):
        def submit(self, *given):
            with lock:
                now.append(1)
                most.append(len(now))
            return super().submit(*given)

    def work() -> None:
        with lock:
            now.pop()

    limits = iter([1, 3, *[2] * 100])
    with Recording(8) as pool:
        list(call_all(pool, never, work, [()] * 20, lambda: next(limits)))
    assert len(most) == 20
    assert max(most) <= 3


def test_a_caller_without_a_turn_still_has_one_call():
    with ThreadPoolExecutor(1) as pool:
        assert list(call_all(pool, never, abs, [(-1,), (-2,)], lambda: 0)) == [1, 2]


def test_an_error_cancels_the_calls_that_have_not_begun():
    class OneFails(Idle):
        def submit(self, *given, **options) -> Future:
            future = super().submit(*given, **options)
            if len(self.futures) == 1:
                future.set_exception(StoreError("disk full"))
            return future

    idle = OneFails()
    with pytest.raises(StoreError, match="disk full"):
        list(call_all(idle, never, len, [("",)] * 5, lambda: 3))
    assert [future.cancelled() for future in idle.futures] == [False, True, True]


def test_a_caller_that_stops_listening_cancels_its_calls():
    class FirstIsDone(Idle):
        def submit(self, *given, **options) -> Future:
            future = super().submit(*given, **options)
            if len(self.futures) == 1:
                future.set_result(1)
            return future

    idle = FirstIsDone()
    results = call_all(idle, never, len, [("",)] * 5, lambda: 3)
    assert next(results) == 1
    results.close()
    assert [future.cancelled() for future in idle.futures] == [False, True, True]


def test_an_executor_without_threads_is_one_line(monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ExecutionError, match="starts no more threads"):
            call(pool, never, abs, -1)
