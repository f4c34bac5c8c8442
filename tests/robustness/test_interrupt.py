"""Runs that are killed at every file-system step, or asked to stop: nothing is lost, nothing half
done.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.store.store import Store
from tests.helpers.builders import SETTLED
from tests.helpers.cache_files import digest_of
from tests.helpers.processes import killed_at

SMALL_BLOCKS = "from paroquant_stream.files import block_writer\nblock_writer.BLOCK = 4096\n"
KILL = killed_at(
    *("fsync", "replace", "posix_fallocate", "open", "pwrite", "mkdir"),
    setup=SETTLED + SMALL_BLOCKS,
)

SLOW = """
import sys, time
from paroquant_stream.cli import convert
from tests.helpers import slow_worker
def slow():
    print("ticking", file=sys.stderr, flush=True)
    time.sleep(0.2)
slow_worker.before_each_tick(slow)
sys.exit(convert.main(sys.argv[1:]))
"""


def published(cache) -> dict[str, str]:
    """Key -> digest of the bytes of every entry that is there."""
    return {path.stem: digest_of(path) for path in cache.rglob("entries/*/*.safetensors")}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_step_only_unpublished_work_is_redone(scattered_dir, tmp_path, stride):
    """SIGKILL before every `stride`-th file-system call, until a run gets through unkilled."""
    whole = convert(make_request(scattered_dir, cache_dir=tmp_path / "whole", jobs=1))
    right = {record.key: record.digest for record in whole.manifest.entries}
    step, killed = 0, 0
    while True:
        step += stride
        cache = tmp_path / f"cache{step}"
        arguments = [str(scattered_dir), "--cache-dir", str(cache), "--jobs", "1", "--json"]
        run = subprocess.run(
            [sys.executable, "-c", KILL, str(step), *arguments], capture_output=True
        )
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
        killed += 1
        kept = published(cache)
        assert kept.items() <= right.items()
        result = convert(make_request(scattered_dir, cache_dir=cache, jobs=1))
        redone = {report.key for report in result.shards if report.action == "converted"}
        assert redone == right.keys() - kept.keys()
        assert published(cache) == right
        assert not list((cache / "v1" / "tmp").iterdir())
    assert killed > 100 / stride


@pytest.mark.parametrize("pairs", [3, pytest.param(60, marks=pytest.mark.long)])
def test_killed_again_while_it_resumes_it_still_comes_out_right(scattered_dir, tmp_path, pairs):
    whole = convert(make_request(scattered_dir, cache_dir=tmp_path / "whole", jobs=1))
    right = {record.key: record.digest for record in whole.manifest.entries}
    steps, killed = random.Random(0), 0
    for pair in range(pairs):
        cache = tmp_path / f"cache{pair}"
        arguments = [str(scattered_dir), "--cache-dir", str(cache), "--jobs", "1", "--quiet"]
        for step in (steps.randint(5, 50), steps.randint(1, 40)):
            done = subprocess.run(
                [sys.executable, "-c", KILL, str(step), *arguments], capture_output=True
            )
            killed += done.returncode == -signal.SIGKILL
            assert published(cache).items() <= right.items()
        convert(make_request(scattered_dir, cache_dir=cache, jobs=1))
        assert published(cache) == right
    assert killed > pairs


HOLD = """
import sys, time
from pathlib import Path
from paroquant_stream.store.store import Store
with Store(Path(sys.argv[1])).lock("m"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_whose_holder_is_killed_is_free_at_once(tmp_path):
    store = Store(tmp_path / "cache")
    store.create()
    command = [sys.executable, "-c", HOLD, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    started = time.monotonic()
    with store.lock("m"):
        assert time.monotonic() - started < 1


def test_a_process_that_used_mlx_converts_in_threads(model_dir, tmp_path):
    """MLX's own threads must not keep a conversion from ending (fork would hang)."""
    import asyncio

    import mlx.core as mx

    mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))

    def run(name: str):
        return convert(make_request(model_dir, cache_dir=tmp_path / name, jobs=2))

    async def beside():
        return await asyncio.wait_for(asyncio.to_thread(run, "thread"), 30)

    first, second = run("main"), asyncio.run(beside())
    assert [r.digest for r in first.manifest.entries] == [r.digest for r in second.manifest.entries]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_signal_ends_the_run_soon_and_cleanly(model_dir, tmp_path, number, code, jobs):
    arguments = [str(model_dir), "--cache-dir", str(tmp_path / "cache"), "--jobs", jobs]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stderr.readline().startswith(b"ticking")
    process.send_signal(number)
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert time.monotonic() - sent < 2
    assert b"interrupted" in stderr
    assert b"Traceback" not in stderr
    assert not list((tmp_path / "cache" / "v1" / "tmp").iterdir())


SIGNALLED = """
import signal, sys, threading, time
from paroquant_stream.cli import convert
from tests.helpers import slow_worker
once = threading.Lock()
def signalled():
    time.sleep(0.2)
    if once.acquire(blocking=False):
        print("signalled", file=sys.stderr, flush=True)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
slow_worker.before_each_tick(signalled)
sys.exit(convert.main(sys.argv[1:]))
"""


def test_a_signal_that_a_worker_thread_receives_ends_the_run(model_dir, tmp_path):
    """The system may give a signal to any thread, and the wait of the main one goes on."""
    arguments = [str(model_dir), "--cache-dir", str(tmp_path / "cache"), "--jobs", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, *arguments], stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == b"signalled\n"
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - sent < 4
    assert process.returncode == 143
    assert b"interrupted" in stderr


STUCK = """
import os, sys, time
from paroquant_stream.cli import convert, common as exits
real = os.fsync
def slow(fd):
    print("stuck", file=sys.stderr, flush=True)
    time.sleep(30)
    real(fd)
os.fsync = slow
exits.end_with(lambda: convert.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_does_not_wait_for_a_disk_that_takes_its_time(model_dir, tmp_path, number, code):
    cache = tmp_path / "cache"
    cache.joinpath("v1", "tmp").mkdir(parents=True)  # so that the first fsync is an entry's
    for name in ("entries", "manifests", "memo", "locks"):
        cache.joinpath("v1", name).mkdir()
    arguments = [str(model_dir), "--cache-dir", str(cache), "--jobs", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stderr.readline().startswith(b"stuck")
    process.send_signal(number)
    sent = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - sent < 2
    assert process.returncode == code
    assert not list((cache / "v1" / "tmp").iterdir())


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.long)])
def test_processes_on_one_model_convert_each_shard_once(model_dir, tmp_path, count):
    command = [sys.executable, "-m", "paroquant_stream.convert", str(model_dir), "--json"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--jobs", "2"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    outputs = [json.loads(process.communicate(timeout=60)[0]) for process in running]
    assert all(process.returncode == 0 for process in running)
    actions = [shard["action"] for output in outputs for shard in output["shards"]]
    assert actions.count("converted") == 3
    assert len({json.dumps([s["digest"] for s in output["shards"]]) for output in outputs}) == 1
