"""Worker processes convert as threads do, and none remains however the run ends."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import BrokenExecutor

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    ExecutionError,
    OutOfRangeError,
    WorkersLostError,
    WorkersUnfitError,
)
from paroquant_stream.execution import processes as module
from paroquant_stream.execution.processes import processes
from paroquant_stream.transform import unit_pool
from tests.helpers import slow_worker
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.cache_files import entries, temps
from tests.helpers.paths import ROOT
from tests.helpers.processes import wait_for_the_end_of

pytestmark = pytest.mark.slow  # each starts worker processes
LIMIT = 60  # seconds to wait for what happens at once; reached only by a failure
SLOW = """
import sys
from paroquant_stream.cli import convert, common
from paroquant_stream.transform import unit_pool
from tests.helpers import slow_worker
call_all = unit_pool.call_all
unit_pool.call_all = lambda executor, poll, _, *rest: call_all(
    executor, poll, slow_worker.slow, *rest
)
common.end_with(lambda: convert.main(sys.argv[1:]))
"""


def test_processes_write_the_entries_that_threads_write(scattered_dir, tmp_path):
    arguments = [str(scattered_dir), "--jobs", "2", "--quiet"]
    assert main([*arguments, "--cache-dir", str(tmp_path / "a")]) == 0
    remote = [*arguments, "--cache-dir", str(tmp_path / "b"), "--executor", "process"]
    assert main(remote) == 0
    assert entries(tmp_path / "b") == entries(tmp_path / "a")
    assert len(entries(tmp_path / "b")) == 3


def test_an_error_of_a_worker_has_its_own_class(tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("f4") * 1e6
    directory = write_checkpoint(tmp_path / "m", tensors, cut_evenly(3))
    with processes(2) as pool, pytest.raises(OutOfRangeError, match=r"model\.norm\.weight"):
        convert_checkpoint(directory, executor=pool, dtype="float16")


def test_a_dead_worker_is_one_message_and_the_next_run_resumes(model_dir, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, processes(1) as pool:
        patch.setattr(unit_pool, "run_remote", slow_worker.deadly)
        with pytest.raises(WorkersLostError, match=r"exit code 9.*run again to resume"):
            convert_checkpoint(model_dir, cache_dir=cache, executor=pool)
    assert not entries(cache)
    assert not temps(cache)
    convert_checkpoint(model_dir, cache_dir=cache)
    assert len(entries(cache)) == 3


@pytest.mark.parametrize(
    ("number", "group", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, 143),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
)
def test_no_worker_outlives_the_run(model_dir, tmp_path, number, group, code):
    """Every worker has stderr open: `communicate` returns when the last one has ended."""
    arguments = [str(model_dir), "--cache-dir", str(tmp_path / "cache"), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "--executor", "process"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr.readline().startswith(b"ticking")
    os.killpg(process.pid, number) if group else process.send_signal(number)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert (b"interrupted" in stderr) == (code > 0)
    if code > 0:
        assert not temps(tmp_path / "cache")  # the run waited for its workers
    wait_for_the_end_of(temps(tmp_path / "cache"))
    convert_checkpoint(model_dir, cache_dir=tmp_path / "cache")
    assert not temps(tmp_path / "cache")


def test_ctrl_c_in_a_terminal_does_not_reach_a_worker():
    with processes(1) as pool:
        (worker,) = [each.process for each in pool._workers]  # private: its process group
        assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()
        assert pool.submit(os.getpid).result(LIMIT) == worker.pid


def test_the_pool_has_as_many_jobs_as_processes():
    with processes(3) as pool:
        assert make_request(".", executor=pool).jobs == 3
        assert make_request(".", executor=pool, jobs=5).jobs == 5


def fails_to_return() -> object:
    return threading.Lock()


def refuse() -> None:
    raise OutOfRangeError("model.norm.weight: too large")


def die() -> None:
    os._exit(7)


def waits() -> None:
    time.sleep(LIMIT)


def test_a_worker_answers_call_after_call():
    with processes(2) as pool:
        found = [pool.submit(divmod, number, 7) for number in range(20)]
        assert [each.result(LIMIT) for each in found] == [divmod(n, 7) for n in range(20)]
        with pytest.raises(OutOfRangeError, match="too large"):
            pool.submit(refuse).result(LIMIT)
        with pytest.raises(RuntimeError, match="cannot be returned"):
            pool.submit(fails_to_return).result(LIMIT)
        assert pool.submit(abs, -1).result(LIMIT) == 1


def test_a_call_that_cannot_be_sent_is_an_error_and_the_worker_lives():
    with processes(1) as pool:
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            pool.submit(lambda: 1).result(LIMIT)
        assert pool.submit(abs, -1).result(LIMIT) == 1


def test_a_function_that_a_worker_does_not_have_is_an_error():
    module = types.ModuleType("absent_elsewhere")
    exec("def function(): pass", vars(module))
    sys.modules["absent_elsewhere"] = module
    try:
        with processes(1) as pool:
            with pytest.raises(ImportError, match="absent_elsewhere"):
                pool.submit(module.function).result(LIMIT)
            assert pool.submit(abs, -1).result(LIMIT) == 1
    finally:
        del sys.modules["absent_elsewhere"]


def test_a_dead_worker_is_an_error_of_the_executor():
    with processes(1) as pool:
        for _ in range(2):  # it stays dead
            with pytest.raises(BrokenExecutor, match="exit code 7"):
                pool.submit(die).result(LIMIT)


def test_the_workers_end_with_the_block():
    with processes(2) as pool:
        workers = [each.process for each in pool._workers]  # private: to see that they end
        pool.submit(abs, -1).result(LIMIT)
    assert [worker.poll() is not None for worker in workers] == [True, True]


def test_an_error_in_the_block_does_not_wait_for_the_workers():
    with pytest.raises(KeyError), processes(1) as pool:
        (worker,) = [each.process for each in pool._workers]  # private: to see that it ends
        call = pool.submit(waits)
        pool.submit(waits)
        raise KeyError
    assert worker.poll() == -signal.SIGKILL
    with pytest.raises(BrokenExecutor):
        call.result(0)


def test_the_jobs_of_a_worker_that_has_ended_end_with_its_parent():
    """The end of the pipe ends a call that would go on for a minute."""
    script = """
import os, sys
from paroquant_stream.execution.processes import Processes
from tests.execution import test_processes
pool = Processes(1)
pool.submit(os.write, 2, b"started").result()
pool.submit(test_processes.waits)
pool.submit(abs, -1)
os._exit(0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=LIMIT / 2)  # until no process has stderr open
    assert stderr == b"started"


MAIN = """
import sys
from paroquant_stream import convert_checkpoint
from paroquant_stream.execution import automatic
automatic.MIN_BYTES = 1
with open(sys.argv[3], "a") as file:
    file.write("once")
convert_checkpoint(sys.argv[1], cache_dir=sys.argv[2], jobs=2)
"""


def test_a_program_need_not_protect_its_main_module(model_dir, tmp_path):
    """It has no `if __name__ == "__main__"`, and runs once although processes convert."""
    (tmp_path / "program.py").write_text(MAIN)
    given = [str(model_dir), str(tmp_path / "cache"), str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), *given], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "runs").read_text() == "once"
    assert len(entries(tmp_path / "cache")) == 3


@pytest.mark.parametrize("environment", [{}, {"PYTHONSAFEPATH": "1"}])
def test_a_program_on_stdin_converts_in_processes(model_dir, tmp_path, environment):
    given = [str(model_dir), str(tmp_path / "cache"), str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-", *given], input=MAIN, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "runs").read_text() == "once"


UPGRADED = """
import sys
from pathlib import Path
from paroquant_stream.cli import common, convert
from paroquant_stream.transform import quantize, unit_pool
if sys.argv[1] == "upgrade":
    path = Path(quantize.__file__)
    path.write_text(path.read_text().replace("def quantize_rows(", "def quantize_rows(*_, "))
    path.write_text(path.read_text() + "\\nquantize_rows = None\\n")
common.end_with(lambda: convert.main(sys.argv[2:]))
"""


@pytest.fixture
def installed(tmp_path):
    """A copy of the package, and an environment in which it is the one that is found."""
    shutil.copytree(ROOT / "paroquant_stream", tmp_path / "site" / "paroquant_stream")
    return os.environ | {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize(("upgrade", "code"), [("upgrade", 1), ("keep", 0)])
def test_workers_of_replaced_code_convert_nothing(model_dir, tmp_path, installed, upgrade, code):
    given = [str(model_dir), "--cache-dir", str(tmp_path / "cache"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", UPGRADED, upgrade, *given, "--executor", "process"],
        env=installed, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stderr.count("\n") == code
    assert ("transform.quantize is not what this program has" in done.stderr) == bool(code)
    assert len(entries(tmp_path / "cache")) == (0 if code else 3)


def test_a_program_that_is_no_python_is_an_error_of_an_explicit_pool(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(WorkersUnfitError, match=r"/true: .* ended before it answered"):
        with processes(1):
            pass


def test_a_program_that_changed_its_directory_has_workers(installed, tmp_path):
    """Its package was found by the empty first entry of `sys.path`."""
    script = """
import os
import paroquant_stream
os.chdir("/")
from paroquant_stream.execution.processes import processes
with processes(1) as pool:
    assert pool.submit(abs, -1).result() == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "site", env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


FORKS = """
import ctypes, os, signal, sys, time
from paroquant_stream.execution import processes
from tests.execution import test_processes
pool = processes.Processes(1)
pool.submit(os.write, 2, b"started").result()
processes.END_SECONDS = 60
fork = ctypes.PyDLL(None).fork if sys.argv[1] == "raw" else os.fork  # as a library in C forks
if fork() == 0:
    os.close(2)
    time.sleep(60)
    os._exit(0)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
pool.shutdown()
os.write(2, b" ended")
os._exit(0)
"""


@pytest.mark.parametrize("end", ["killed", "shut down"])
@pytest.mark.parametrize("how", ["raw", "python"])
def test_a_forked_child_keeps_no_worker_alive(how, end, request):
    """The child sleeps with the pipe; only workers have stderr open once the parent has ended."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, how, end]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    request.addfinalizer(lambda: os.killpg(process.pid, signal.SIGKILL))
    _, stderr = process.communicate(timeout=LIMIT / 2)
    assert stderr == (b"started" if end == "killed" else b"started ended")


def test_a_worker_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    with processes(1) as pool:
        (worker,) = [each.process for each in pool._workers]  # private: to see how it ends
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)  # until it has stopped
    assert worker.returncode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside the pool's threads
def test_the_end_of_a_forked_child_leaves_the_workers_alone():
    with processes(1) as pool:
        (pipe,) = [each.pipe for each in pool._workers]  # private: what the child closes
        child = os.fork()
        if child == 0:
            pool.kill()
            os._exit(not pipe.closed)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.submit(abs, -1).result(LIMIT) == 1


def test_calls_without_threads_are_one_line(monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with processes(1) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ExecutionError, match="starts no more threads"):
            pool.submit(abs, -1)


def flags_of_worker() -> list[object]:
    return [getattr(sys.flags, name) for name in module._FLAGS.values()] + [sys.warnoptions]


@pytest.mark.parametrize("options", [[], ["-I", "-O"], ["-E", "-s", "-P", "-B", "-Wignore"]])
def test_a_worker_has_the_options_of_its_parent(options):
    script = f"""
import sys
sys.path[:] = {[str(ROOT), *sys.path]!r}
from paroquant_stream.execution.processes import processes
from tests.execution.test_processes import flags_of_worker
with processes(1) as pool:
    if pool.submit(flags_of_worker).result() != flags_of_worker():  # -O removes an assert
        sys.exit("they differ")
print(sys.flags)
"""
    done = subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("isolated=1" in done.stdout) == ("-I" in options)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside a thread
def test_no_child_is_forked_while_a_worker_starts(monkeypatch):
    """It would hold the pipe by which `Popen` learns that the program runs."""
    events, threads, real = [], [], module.subprocess.Popen

    def fork():
        child = os.fork()
        if child == 0:
            os._exit(0)
        events.append("forked")
        os.waitpid(child, 0)

    def start(*arguments, **options):
        threads.append(threading.Thread(target=fork))
        threads[0].start()
        threads[0].join(0.2)
        events.append("started")
        return real(*arguments, **options)

    monkeypatch.setattr(module.subprocess, "Popen", start)
    with processes(1):
        threads[0].join()
    assert events == ["started", "forked"]
