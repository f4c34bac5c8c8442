"""This process works from the start, and others beside it once each has answered."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor

import pytest

from paroquant_stream.errors import ExecutionError
from paroquant_stream.execution import eager_processes, processes
from paroquant_stream.execution.eager_processes import EagerProcesses
from tests.helpers.pool_calls import LIMIT, hold, meet, wait_for

real_identity = eager_processes.identity


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """Start programs that never answer in place of Python."""
    program = tmp_path / "silent"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.fixture
def pool_of(request):
    """Make pools, and end those that a test leaves."""
    pools = []

    def make(count: int) -> EagerProcesses:
        pools.append(EagerProcesses(count))
        return pools[-1]

    yield make
    for pool in pools:
        pool.kill()


def greeted(pool: EagerProcesses) -> EagerProcesses:
    """Wait until every process has answered or was given up."""
    pool._greeter.shutdown()  # private: as no call waits for it
    return pool


def codes(pool: EagerProcesses) -> list[int | None]:
    return [worker.process.returncode for worker in pool._workers]  # private: to see how they end


def warnings(caplog) -> list[str]:
    return [each.message for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.usefixtures("silent")
def test_all_calls_return_though_no_process_answers(pool_of):
    pool = pool_of(4)
    found = [pool.submit(os.getpid) for _ in range(20)]
    assert {each.result(LIMIT) for each in found} == {os.getpid()}
    assert len(pool._silent) == 3  # private: they are still waited for


@pytest.mark.usefixtures("silent")
def test_a_thread_is_kept_from_call_to_call(pool_of):
    """Its buffers are those of the thread."""

    def work() -> int:
        time.sleep(0.001)
        return threading.get_ident()

    pool = pool_of(3)
    found = {each.result(LIMIT) for each in [pool.submit(work) for _ in range(30)]}
    assert len(found) == 1
    assert threading.get_ident() not in found


@pytest.mark.usefixtures("silent")
def test_a_pool_that_ends_at_once_waits_for_no_answer(monkeypatch, caplog):
    pool = EagerProcesses(3)
    waited, real = [], processes.Worker.check
    monkeypatch.setattr(processes.Worker, "check", lambda *a: waited.append(a) or real(*a))
    found = pool.submit(abs, -1)
    pool.shutdown()
    assert found.result(0) == 1
    assert not waited
    assert codes(pool) == [-signal.SIGKILL] * 2
    assert warnings(caplog) == []


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("answers", [False, True])
def test_a_pool_that_is_killed_warns_of_no_process(pool_of, caplog, monkeypatch, answers):
    """Whether the greeter learns of the end of a process before or after the pool forgets it."""
    pool, real = pool_of(4), EagerProcesses.shutdown

    def shutdown(self, *arguments, **options):
        if answers:
            greeted(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(EagerProcesses, "shutdown", shutdown)
    pool.kill()
    assert codes(pool) == [-signal.SIGKILL] * 3
    assert warnings(caplog) == []


def test_each_unfit_process_is_a_thread_and_all_are_one_warning(
    pool_of, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    pool = greeted(pool_of(4))
    met = [pool.submit(meet, str(tmp_path / "met"), LIMIT, 4) for _ in range(4)]
    assert {each.result(LIMIT) for each in met} == {os.getpid()}
    (warning,) = warnings(caplog)
    assert warning.startswith(f"no worker processes, so threads convert: {sys.executable}: ")
    assert "\n" not in warning
    assert len({pool.submit(threading.get_ident).result(LIMIT) for _ in range(40)}) <= 4


@pytest.mark.usefixtures("silent")
def test_silence_is_one_warning_and_ends_the_processes(pool_of, monkeypatch, caplog):
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 0.05)
    pool = greeted(pool_of(3))
    assert [worker.process.wait(LIMIT) for worker in pool._workers] == [-signal.SIGKILL] * 2
    (warning,) = warnings(caplog)
    assert "no answer in 0 s" in warning


@pytest.mark.slow
def test_a_process_works_once_its_identity_was_checked(pool_of, monkeypatch, tmp_path):
    events, real, put = [], processes.difference, EagerProcesses._admit

    def admit(self, worker, *rest):
        before = self._idle.qsize()
        put(self, worker, *rest)
        events.append(self._idle.qsize() - before)

    monkeypatch.setattr(processes, "difference", lambda *a: events.append("checked") or real(*a))
    monkeypatch.setattr(EagerProcesses, "_admit", admit)
    pool = greeted(pool_of(3))
    assert events == ["checked", 1] * 2
    met = [pool.submit(meet, str(tmp_path / "met"), LIMIT, 3) for _ in range(3)]
    pids = {each.result(LIMIT) for each in met}
    assert pids == {os.getpid(), *(worker.process.pid for worker in pool._workers)}


@pytest.mark.slow
def test_a_process_of_other_code_does_nothing(pool_of, monkeypatch, caplog, tmp_path):
    other = real_identity() | {"version": "0.0.0"}
    monkeypatch.setattr(eager_processes, "identity", lambda: other)
    pool = greeted(pool_of(3))
    met = [pool.submit(meet, str(tmp_path / "met"), LIMIT, 3) for _ in range(3)]
    assert {each.result(LIMIT) for each in met} == {os.getpid()}
    (warning,) = warnings(caplog)
    assert "version: expected 0.0.0, found" in warning
    assert [worker.process.wait(LIMIT) for worker in pool._workers] == [-signal.SIGKILL] * 2


@pytest.mark.slow
def test_an_answer_that_breaks_its_check_is_unfit(pool_of, monkeypatch, caplog):
    def fail(*_):
        raise RecursionError("too deep")

    monkeypatch.setattr(processes, "difference", fail)
    pool = greeted(pool_of(3))
    (warning,) = warnings(caplog)
    assert "it answers something else (RecursionError: too deep)" in warning
    assert len(pool._here) == 3  # private: the greeter went on


@pytest.mark.slow
def test_a_process_that_dies_after_its_answer_is_an_error(pool_of, tmp_path):
    pool = greeted(pool_of(2))
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)  # private
    met = [pool.submit(hold, str(tmp_path / str(n)), str(tmp_path)) for n in range(2)]
    errors = [each.exception(LIMIT) for each in met]
    assert {type(each) for each in errors} == {BrokenExecutor, type(None)}
    assert f"exit code {-signal.SIGKILL}" in str(next(filter(None, errors)))


@pytest.mark.usefixtures("silent")
def test_no_call_that_waits_runs_after_a_kill(pool_of, tmp_path):
    pool, begun, go_on = pool_of(3), tmp_path / "begun", tmp_path / "go on"
    first = pool.submit(hold, str(begun), str(go_on))
    wait_for(begun)
    waiting = [pool.submit(os.mkdir, tmp_path / f"ran{number}") for number in range(2)]
    until = time.monotonic() + LIMIT
    while not all(each.running() for each in waiting):  # for a worker
        assert time.monotonic() < until
    ending = threading.Thread(target=pool.kill)
    ending.start()
    while not pool._ending:  # private
        assert time.monotonic() < until
    go_on.touch()
    ending.join(LIMIT)
    assert first.result(0) == os.getpid()
    for each in waiting:
        with pytest.raises(BrokenExecutor, match="was ended"):
            each.result(0)
    assert not list(tmp_path.glob("ran*"))


@pytest.mark.usefixtures("silent")
def test_a_kill_does_not_wait_for_a_call_that_is_stuck(pool_of, monkeypatch, tmp_path):
    monkeypatch.setattr(eager_processes, "INTERRUPT_TIMEOUT", 0.01)
    pool, begun, go_on = pool_of(2), tmp_path / "begun", tmp_path / "go on"
    stuck = pool.submit(hold, str(begun), str(go_on))
    wait_for(begun)
    pool.kill()
    with pytest.raises(BrokenExecutor, match="ended while it ran"):
        stuck.result(0)
    assert codes(pool) == [-signal.SIGKILL]
    go_on.touch()
    pool._here[0].shutdown()  # private: no thread remains for the next test


@pytest.mark.usefixtures("silent")
def test_an_interrupt_of_the_shutdown_kills_the_others(monkeypatch):
    def interrupt(*_arguments, **_options):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with processes.processes(2, EagerProcesses) as pool:
            monkeypatch.setattr(EagerProcesses, "shutdown", interrupt)
    assert codes(pool) == [-signal.SIGKILL]


@pytest.mark.usefixtures("silent")
def test_an_interrupt_while_processes_start_leaves_none(monkeypatch):
    started, real = [], processes.Worker._open

    def interrupt(self):
        real(self)
        started.append(self.process)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(processes.Worker, "_open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        EagerProcesses(4)
    assert started[0].returncode == -signal.SIGKILL
    started[1].kill()  # its pipe, which only the pool had, is closed: Python would end
    started[1].wait()


@pytest.mark.parametrize("place", ["greeter", "call", "worker"])
@pytest.mark.usefixtures("silent")
def test_a_system_without_more_threads_is_one_line(pool_of, monkeypatch, place):
    real = threading.Thread.start

    def start(thread):
        if thread.name.startswith({"call": "process"}.get(place, place)):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ExecutionError, match="starts no more threads"):
        pool_of(2).submit(abs, -1).result(LIMIT)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside the pool's threads
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("end", ["kill", "shutdown"])
def test_a_forked_child_neither_hangs_nor_ends_the_processes(pool_of, monkeypatch, tmp_path, end):
    monkeypatch.setattr(eager_processes, "INTERRUPT_TIMEOUT", 2 * LIMIT)
    pool, begun, go_on = pool_of(3), tmp_path / "begun", tmp_path / "go on"
    call = pool.submit(hold, str(begun), str(go_on))
    wait_for(begun)
    with pool._lock:  # private: as if another thread held it at that moment
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT)  # ends a child that hangs
            getattr(pool, end)()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.touch()
    assert call.result(LIMIT) == os.getpid()
    assert [worker.process.poll() for worker in pool._workers] == [None, None]
