"""A run that ends while its processes still start, or work: none of them is left, nothing is lost.

Every process has stderr open: `communicate` returns once the last one has ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from tests.helpers.cache_files import entries, temps
from tests.helpers.paths import ROOT
from tests.helpers.pool_calls import LIMIT
from tests.helpers.processes import ENDS, wait_for_the_end_of

pytestmark = pytest.mark.slow  # each starts processes
POOL = """
import os, signal, sys, threading, time
from paroquant_stream import convert_checkpoint
from paroquant_stream.cli import common, convert
from paroquant_stream.execution import automatic, eager_processes, processes
from paroquant_stream.transform import unit_pool
from tests.helpers import slow_worker

automatic.MIN_BYTES = 1
processes.ANSWER_SECONDS = 600.0
Pool, Worker = eager_processes.EagerProcesses, processes.Worker

def answer_late():
    "Processes answer once their pipe has ended: they start too slowly to be of use."
    late = "import select, sys\\nselect.select([int(sys.argv[1])], [], [])\\n"
    processes._START = late + processes._START

def greet_first():
    "Work begins once the processes have answered."
    start = Pool._start
    Pool._start = lambda self, count: (start(self, count), self._greeter.shutdown())

def slow_down():
    "Units tell of each chunk, and take seconds."
    call_all = unit_pool.call_all
    unit_pool.call_all = lambda executor, poll, _, *rest: call_all(
        executor, poll, slow_worker.slow, *rest
    )

def stop_here():
    os.write(2, b"stopped\\n")
    time.sleep(60)
"""
MOMENTS = {
    "between two starts": """
real = Worker._open
Worker._open = lambda self: stop_here() if processes._pipes else real(self)
""",
    "before a call": """
answer_late()
start = Pool._start
Pool._start = lambda self, count: (start(self, count), stop_here())
""",
    "only here": "answer_late(); slow_down()",
    "everywhere": "greet_first(); slow_down()",
}
COMMAND = "\ncommon.end_with(lambda: convert.main(sys.argv[1:]))"


def started(script: str, *arguments: object, **options) -> subprocess.Popen:
    """Start a program with these arguments and a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-B", "-c", POOL + script, *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True,
        **options,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Return code, stdout and stderr of a program once all its processes have ended."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_process_outlives_a_run_that_is_ended(model_dir, tmp_path, moment, number, code):
    cache = tmp_path / "cache"
    arguments = [model_dir, "--cache-dir", cache, "--jobs", 3, "--quiet"]
    process = started(MOMENTS[moment] + COMMAND, *arguments)
    assert process.stderr.readline() in ("stopped\n", "ticking\n")
    os.killpg(process.pid, number)  # of a terminal; the others have groups of their own
    found, _, stderr = ended(process)
    assert found == code
    lines = [line for line in stderr.splitlines() if line != "ticking"]
    assert len(lines) == (code > 0)
    assert all(line.startswith("interrupted; finished shards are kept") for line in lines)
    if code > 0:
        assert not temps(cache)
    wait_for_the_end_of(temps(cache))
    convert_checkpoint(model_dir, cache_dir=cache)
    convert_checkpoint(model_dir, cache_dir=tmp_path / "right")
    assert entries(cache) == entries(tmp_path / "right")
    assert not temps(cache)


@pytest.mark.parametrize("setup", ["answer_late()", "greet_first()", ""])
def test_a_short_run_waits_for_no_process_and_prints_nothing(model_dir, tmp_path, setup):
    arguments = [model_dir, "--cache-dir", tmp_path / "cache", "--jobs", 4, "--quiet"]
    assert ended(started(setup + COMMAND, *arguments)) == (0, "", "")
    convert_checkpoint(model_dir, cache_dir=tmp_path / "right")
    assert entries(tmp_path / "cache") == entries(tmp_path / "right")
    assert not temps(tmp_path / "cache")


UPGRADED = """
from pathlib import Path
from paroquant_stream.transform import quantize
path = Path(quantize.__file__)
path.write_text(path.read_text() + "\\nquantize_rows = None\\n")
greet_first()
"""


def test_processes_of_replaced_code_are_replaced_by_threads(model_dir, tmp_path):
    shutil.copytree(ROOT / "paroquant_stream", tmp_path / "site" / "paroquant_stream")
    shutil.copytree(ROOT / "tests" / "helpers", tmp_path / "site" / "tests" / "helpers")
    arguments = [model_dir, "--cache-dir", tmp_path / "cache", "--jobs", 3, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    process = started(UPGRADED + COMMAND, *arguments, env=environment, cwd=tmp_path)
    code, _, stderr = ended(process)
    assert code == 0
    assert stderr.count("\n") == 1
    assert "no worker processes, so threads convert: " in stderr
    assert "transform.quantize is not what this program has in memory" in stderr
    convert_checkpoint(model_dir, cache_dir=tmp_path / "right")
    assert entries(tmp_path / "cache") == entries(tmp_path / "right")


@pytest.mark.parametrize("setup", ["answer_late()", ""])
def test_a_program_that_ends_beside_its_run_says_so(model_dir, tmp_path, setup):
    code, stdout, stderr = ended(started(setup + ENDS, model_dir, tmp_path / "cache"))
    assert (code, stderr) == (0, "")
    assert stdout.startswith("the program ended while a thread of it was converting; let")
    assert stdout.count("\n") == 1


FORKS = """
answer_late()
inside, go_on = threading.Event(), threading.Event()
real = unit_pool.run_remote

def run_remote(*arguments):
    inside.set()
    go_on.wait(60)
    return real(*arguments)

unit_pool.run_remote = run_remote
thread = threading.Thread(
    target=convert_checkpoint, args=sys.argv[1:2], kwargs={"cache_dir": sys.argv[2], "jobs": 3}
)
thread.start()
inside.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends a child that hangs
    sys.exit(0)  # with all that the interpreter does at its end
_, status = os.waitpid(child, 0)
(pool,) = processes._pools
alive = [worker.process.poll() for worker in pool._workers]
go_on.set()
thread.join()
print(os.waitstatus_to_exitcode(status), alive)
"""


def test_a_child_forked_beside_silent_processes_ends_alone(model_dir, tmp_path):
    ignored = os.environ | {"PYTHONWARNINGS": "ignore::DeprecationWarning"}
    process = started(FORKS, model_dir, tmp_path / "cache", env=ignored)
    assert ended(process) == (0, "0 [None, None]\n", "")
    assert len(entries(tmp_path / "cache")) == 3


HANDLERS = """
called = []
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by no one
signal.signal(signal.SIGALRM, lambda *_: called.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
convert_checkpoint(sys.argv[1], cache_dir=sys.argv[2], jobs=3)
signal.setitimer(signal.ITIMER_REAL, 0)
print(bool(called))
"""


@pytest.mark.parametrize("setup", ["answer_late()", "greet_first()"])
def test_a_program_with_handlers_of_signals_converts(model_dir, tmp_path, setup):
    process = started(setup + HANDLERS, model_dir, tmp_path / "cache")
    assert ended(process) == (0, "True\n", "")
    assert len(entries(tmp_path / "cache")) == 3
    assert not temps(tmp_path / "cache")
