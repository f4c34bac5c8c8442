"""Threads for little work, this process and others for much."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.cli.convert import main
from paroquant_stream.execution import automatic, processes
from paroquant_stream.execution.automatic import MIN_BYTES, Automatic
from paroquant_stream.execution.eager_processes import EagerProcesses
from tests.helpers.cache_files import entries
from tests.helpers.pool_calls import LIMIT, meet

GB = 1 << 30


@pytest.mark.parametrize(("jobs", "size"), [(1, 9 * GB), (16, MIN_BYTES - 1), (16, 0)])
def test_little_work_is_done_by_threads(jobs, size):
    with Automatic() as choice:
        assert choice.choose(jobs, size) is None


@pytest.mark.slow
def test_much_work_is_done_by_one_pool_of_processes(tmp_path):
    with Automatic() as choice:
        pool = choice.choose(2, MIN_BYTES)
        assert isinstance(pool, EagerProcesses)
        assert choice.choose(8, 30 * GB) is pool
        pool._greeter.shutdown()  # private: until the other process has answered
        met = [pool.submit(meet, str(tmp_path), LIMIT) for _ in range(2)]
        assert len({each.result() for each in met} - {os.getpid()}) == 1
    with pytest.raises(RuntimeError):
        pool.submit(abs, -1)


@pytest.mark.parametrize(("name", "value"), [("executable", ""), ("frozen", True)])
def test_an_interpreter_that_cannot_start_again_has_threads(monkeypatch, name, value):
    monkeypatch.setattr(sys, name, value, raising=False)
    with Automatic() as choice:
        assert choice.choose(16, 9 * GB) is None


def test_a_system_without_more_processes_has_threads(monkeypatch, caplog):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(processes.subprocess, "Popen", refuse)
    with Automatic() as choice:
        assert choice.choose(2, 9 * GB) is None
    assert "no worker processes, so threads convert" in caplog.text


@pytest.mark.parametrize("program", ["true", "cat", "no python"])
def test_a_program_that_is_no_python_leaves_the_work_to_threads(
    model_dir, tmp_path, monkeypatch, caplog, program
):
    start = EagerProcesses._start

    def greet_first(self, count):  # else the work could be done before it is known
        start(self, count)
        self._greeter.shutdown()

    monkeypatch.setattr(EagerProcesses, "_start", greet_first)
    monkeypatch.setattr(automatic, "MIN_BYTES", 1)
    monkeypatch.setattr(sys, "executable", shutil.which(program) or "/nowhere/python")
    convert_checkpoint(model_dir, cache_dir=tmp_path / "cache", jobs=2)
    (line,) = [each.message for each in caplog.records if "no worker processes" in each.message]
    assert "\n" not in line
    assert len(entries(tmp_path / "cache")) == 3


def test_a_program_that_never_answers_is_ended_and_asked_once(monkeypatch, caplog, tmp_path):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 0.1)
    started, real = [], processes.subprocess.Popen

    def note(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", note)
    with Automatic() as choice:
        pool = choice.choose(3, 9 * GB)
        assert choice.choose(3, 9 * GB) is pool
        pool._greeter.shutdown()  # private: until it has given up
        met = [pool.submit(meet, str(tmp_path / "met"), LIMIT, 3) for _ in range(3)]
        assert {each.result() for each in met} == {os.getpid()}  # three threads of this process
    assert [each.returncode for each in started] == [-signal.SIGKILL] * 2
    assert caplog.text.count("no answer in 0 s") == 1


@pytest.fixture
def pools(monkeypatch) -> list:
    """What a command chose, with bounds as of a large model."""
    chosen, real = [], Automatic.choose
    monkeypatch.setattr(automatic, "MIN_BYTES", 1)

    def choose(self, *arguments):
        chosen.append(real(self, *arguments))
        return chosen[-1]

    monkeypatch.setattr(Automatic, "choose", choose)
    return chosen


@pytest.mark.slow
def test_a_large_model_is_converted_in_processes(model_dir, tmp_path, pools):
    convert_checkpoint(model_dir, cache_dir=tmp_path / "api", jobs=2)
    arguments = [str(model_dir), "--quiet", "--jobs", "2"]
    assert main([*arguments, "--cache-dir", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--cache-dir", str(tmp_path / "b"), "--executor", "thread"]) == 0
    assert [type(pool) for pool in pools] == [EagerProcesses, EagerProcesses]
    assert entries(tmp_path / "a") == entries(tmp_path / "b") == entries(tmp_path / "api")
    assert len(entries(tmp_path / "a")) == 3


@pytest.mark.usefixtures("settled")
def test_a_command_without_work_chooses_nothing(model_dir, tmp_path, pools, monkeypatch):
    monkeypatch.setattr(automatic, "MIN_BYTES", GB)  # no process is started here
    arguments = [str(model_dir), "--quiet", "--jobs", "3", "--cache-dir", str(tmp_path / "a")]
    for _ in range(2):
        assert main(arguments) == 0
    assert len(pools) == 1
