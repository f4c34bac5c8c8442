"""Worker processes convert as threads do, and none remains however the run ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import OutOfRangeError, WorkersLostError
from paroquant_stream.execution.processes import processes
from paroquant_stream.files import temp_files
from paroquant_stream.transform import remote_runner
from tests.helpers import slow_worker
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.cache_files import entries, temps

pytestmark = pytest.mark.slow  # each starts worker processes
LIMIT = 60  # seconds to wait for what happens at once; reached only by a failure
SLOW = """
import sys
from paroquant_stream.cli import convert, common
from paroquant_stream.transform import remote_runner
from tests.helpers import slow_worker
remote_runner.run_remote = slow_worker.slow
common.end_with(lambda: convert.main(sys.argv[1:]))
"""


def wait_for_the_end_of(names: list[str]) -> None:
    """Wait until init has reaped the processes that these temporary files are named after."""
    for name in names:
        until = time.monotonic() + LIMIT
        pid = int(name.split("-")[3])
        while temp_files._is_running(pid):  # private: what decides whether a leftover is removed
            assert time.monotonic() < until
            time.sleep(0.01)


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
        patch.setattr(remote_runner, "run_remote", slow_worker.deadly)
        with pytest.raises(WorkersLostError, match=r"BrokenProcessPool.*run again to resume"):
            convert_checkpoint(model_dir, cache_dir=cache, executor=pool)
    (left,) = temps(cache)  # it died while it wrote an entry
    assert f"-{os.getpid()}-" not in left
    convert_checkpoint(model_dir, cache_dir=cache)
    assert len(entries(cache)) == 3
    assert not temps(cache)


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


def test_ctrl_c_does_not_reach_a_worker_even_while_it_starts():
    with processes(1) as pool:
        answer = pool.submit(os.getpid)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGINT)  # it has not started Python yet
        assert answer.result(LIMIT) == worker.pid
        os.kill(worker.pid, signal.SIGINT)
        assert pool.submit(os.getpid).result(LIMIT) == worker.pid


def test_the_pool_has_as_many_jobs_as_processes():
    with processes(3) as pool:
        assert make_request(".", executor=pool).jobs == 3
        assert make_request(".", executor=pool, jobs=5).jobs == 5
