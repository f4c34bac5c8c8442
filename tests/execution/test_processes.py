"""Worker processes: the same entries, and none is left behind however the run ends."""

from __future__ import annotations

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
from paroquant_stream.transform import remote_runner as elsewhere
from tests.helpers import slow_worker
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint

SLOW = """
import sys
from paroquant_stream.cli import convert, common as exits
from paroquant_stream.transform import remote_runner as elsewhere
from tests.helpers import slow_worker
elsewhere.run_remote = slow_worker.slow
exits.end_with(lambda: convert.main(sys.argv[1:]))
"""


def entries(cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("v1/entries/*/*.safetensors")}


def temps(cache) -> list[str]:
    return [path.name for path in (cache / "v1" / "tmp").iterdir()]


def wait_for_the_end_of(names: list[str]) -> None:
    """A dead process has its number until init has taken note."""
    for name in names:
        until = time.monotonic() + 10
        pid = int(name.split("-")[3])
        while temp_files._is_running(pid):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_processes_give_the_entries_that_threads_give(scattered_dir, tmp_path):
    arguments = [str(scattered_dir), "--jobs", "2", "--quiet"]
    assert main([*arguments, "--cache-dir", str(tmp_path / "here")]) == 0
    elsewhere_too = [*arguments, "--cache-dir", str(tmp_path / "there"), "--executor", "process"]
    assert main(elsewhere_too) == 0
    assert entries(tmp_path / "there") == entries(tmp_path / "here")
    assert len(entries(tmp_path / "there")) == 3


def test_an_error_of_a_worker_arrives_as_ours(tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("f4") * 1e6
    directory = write_checkpoint(tmp_path / "m", tensors, cut_evenly(3))
    with processes(2) as pool, pytest.raises(OutOfRangeError, match=r"model\.norm\.weight"):
        convert_checkpoint(directory, executor=pool, dtype="float16")


def test_a_process_that_dies_is_one_message_and_the_next_run_goes_on(
    model_dir, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, processes(1) as pool:
        patch.setattr(elsewhere, "run_remote", slow_worker.deadly)
        with pytest.raises(WorkersLostError, match=r"BrokenProcessPool.*run again to resume"):
            convert_checkpoint(model_dir, cache_dir=cache, executor=pool)
    (left,) = temps(cache)  # it died in the middle of a shard
    assert f"-{os.getpid()}-" not in left
    convert_checkpoint(model_dir, cache_dir=cache)
    assert len(entries(cache)) == 3
    assert not temps(cache)


@pytest.mark.parametrize(
    ("number", "group", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C on a terminal
        (signal.SIGTERM, False, 143),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
)
def test_no_worker_outlives_the_run(model_dir, tmp_path, number, group, code):
    """Every worker holds the other end of stderr: `communicate` returns when the last is gone."""
    arguments = [str(model_dir), "--cache-dir", str(tmp_path / "cache"), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "--executor", "process"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr.readline().startswith(b"ticking")
    os.killpg(process.pid, number) if group else process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert (b"interrupted" in stderr) == (code > 0)
    if code > 0:
        assert not temps(tmp_path / "cache")  # the workers were waited for
    wait_for_the_end_of(temps(tmp_path / "cache"))
    convert_checkpoint(model_dir, cache_dir=tmp_path / "cache")
    assert not temps(tmp_path / "cache")


def test_the_pool_is_as_wide_as_it_was_made():
    with processes(3) as pool:
        assert make_request(".", executor=pool).jobs == 3
        assert make_request(".", executor=pool, jobs=5).jobs == 5
