"""Shards converted on an executor: in processes of a Dask cluster on loopback, some of which die,
are of another kind, or see other files.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from paroquant_stream import convert_checkpoint
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    CheckpointError,
    RunCancelledError,
    WorkersLostError,
    WorkersUnfitError,
)
from paroquant_stream.execution import executors as executor
from paroquant_stream.execution.slots import Slot
from paroquant_stream.transform import remote_runner as elsewhere
from paroquant_stream.transform.remote_runner import run_remote
from paroquant_stream.transform.task_runner import Job
from tests.helpers.builders import cut_apart, write_checkpoint
from tests.helpers.loopback_cluster import LoopbackCluster

ABSENT = "import sys; sys.modules['paroquant_stream'] = None"
OLDER = "import paroquant_stream; paroquant_stream.__version__ = '0.0.9'"
BLIND = """
import genericpath
real = genericpath.getsize
def getsize(path):
    if {unseen!r} in path:
        raise FileNotFoundError(2, "No such file or directory", path)
    return real(path)
genericpath.getsize = getsize
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with LoopbackCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def model(tmp_path):
    """Six shards that borrow from each other."""
    return write_checkpoint(tmp_path / "model", cut=cut_apart(6))


@pytest.fixture
def right(model, tmp_path) -> dict[str, bytes]:
    convert_checkpoint(model, cache_dir=tmp_path / "right", jobs=1)
    return entries(tmp_path / "right")


def entries(cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("v1/entries/*/*.safetensors")}


def temps(cache) -> list[str]:
    return [path.name for path in (cache / "v1" / "tmp").iterdir()]


def arguments(cluster, model, cache, *more: str) -> list[str]:
    where = ["--cache-dir", str(cache), "--executor", "dask", "--scheduler", cluster.address]
    return [str(model), *where, "--quiet", *more]


def run(*given: str, **options) -> tuple[int, str]:
    """Exit code and stderr of the command in a process of its own."""
    command = [sys.executable, "-m", "paroquant_stream.convert", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    return done.returncode, done.stderr


def test_a_cluster_gives_the_entries_that_threads_give(cluster, model, right, tmp_path):
    assert run(*arguments(cluster, model, tmp_path / "cache")) == (0, "")
    assert entries(tmp_path / "cache") == right
    assert len(right) == 6
    assert not temps(tmp_path / "cache")


def test_relative_paths_are_those_of_the_caller(cluster, model, right, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = arguments(cluster, "model", "cache")
    assert run(*given, cwd=tmp_path, env=environment) == (0, "")
    assert entries(tmp_path / "cache") == right


def test_the_executor_of_a_client_is_taken_and_used_at_its_width(cluster, model, right, tmp_path):
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        workers = client.get_executor(pure=False, retries=2)
        assert make_request(model, executor=workers).jobs == 2
        convert_checkpoint(model, cache_dir=tmp_path / "cache", executor=workers)
        ran = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert entries(tmp_path / "cache") == right
    assert len(ran) == 2
    assert all(ran.values())


def test_several_models_share_the_cluster(cluster, model, right, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text((model / "config.json").read_text() + " ")
    assert main([str(other), *arguments(cluster, model, tmp_path / "cache")]) == 0
    assert entries(tmp_path / "cache") == right
    assert len(list((tmp_path / "cache").rglob("*.msgpack"))) == 2


def test_sources_are_dropped_by_the_caller(cluster, model, right, tmp_path):
    assert main(arguments(cluster, model, tmp_path / "cache", "--drop-source", "-y")) == 0
    assert entries(tmp_path / "cache") == right
    assert not list(model.glob("*.safetensors"))


def test_shards_go_to_the_cluster_as_they_arrive_from_the_hub(cluster, model, right, tmp_path, hub):
    hub.push("owner/model", model)
    assert main(arguments(cluster, "owner/model", tmp_path / "cache", "--drop-source")) == 0
    assert entries(tmp_path / "cache") == right
    assert len(hub.downloads()) == 6
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_worker_that_is_killed_in_a_shard_has_it_done_by_another(cluster, model, right, tmp_path):
    cluster.arm()
    assert run(*arguments(cluster, model, tmp_path / "cache")) == (0, "")
    pid, left = re.fullmatch(r"(\d+) \['(.*)'\]", cluster.fired()).groups()
    dead = [process for process in cluster.processes if process.pid == int(pid)]
    assert dead[0].wait(10) == -9
    assert temps(tmp_path / "cache") == [left]  # it died in the middle of writing
    assert entries(tmp_path / "cache") == right
    convert_checkpoint(model, cache_dir=tmp_path / "cache")
    assert not temps(tmp_path / "cache")
    cluster.add_worker()
    cluster.wait(2)


ARMED = """
import os, sys
from pathlib import Path
from paroquant_stream.cli import convert, common as exits
Path(sys.argv.pop(1)).write_text(f"{os.getpid()} {sys.argv.pop(1)}")
exits.end_with(convert.main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_run_and_what_it_has_on_the_cluster(
    cluster, model, right, tmp_path, number, code
):
    armed, cache = str(cluster.directory / "armed"), tmp_path / "cache"
    (cluster.directory / "fired").unlink(missing_ok=True)
    command = [sys.executable, "-c", ARMED, armed, str(int(number))]
    done = subprocess.run(
        [*command, *arguments(cluster, model, cache)], capture_output=True, text=True, timeout=60
    )
    assert re.fullmatch(r"\d+ \['.+'\]", cluster.fired())
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert done.stderr.startswith("interrupted; finished shards are kept")
    assert main(arguments(cluster, model, cache)) == 0  # the workers are free again
    assert entries(cache) == right
    assert not temps(cache)


def test_every_worker_that_cannot_do_it_is_named_before_any_work(cluster, model, tmp_path, capsys):
    cache = tmp_path / "cache"
    model_unseen = BLIND.format(unseen=str(model))
    store_unseen = BLIND.format(unseen=str(cache))
    unfit = [cluster.add_worker(p) for p in (ABSENT, OLDER, model_unseen, store_unseen)]
    cluster.wait(6)
    assert main(arguments(cluster, model, cache)) == 1
    for process in unfit:
        process.kill()
        process.wait()
    found = capsys.readouterr().err
    for reason in (
        "ModuleNotFoundError",
        r"__version__: expected 0\.1\.0, found 0\.0\.9",
        rf"{model}/config\.json: expected \d+ bytes, found FileNotFoundError",
        rf"{cache}/v1/tmp/\S+: expected 0 bytes, found FileNotFoundError",
    ):
        assert len(re.findall(rf"\n  tcp://127\.0\.0\.1:\d+: .*{reason}", found)) == 1, found
    assert found.count("tcp://") == 4
    assert not entries(cache)
    assert not temps(cache)


def test_a_scheduler_without_the_package_is_named(model, tmp_path_factory, tmp_path, capsys):
    with LoopbackCluster(tmp_path_factory.mktemp("foreign"), 1, ABSENT) as cluster:
        assert main(arguments(cluster, model, tmp_path / "cache")) == 1
    found = capsys.readouterr().err
    assert f"\n  the Dask scheduler ({cluster.address}): " in found
    assert found.count("ModuleNotFoundError") == 1


def test_a_client_that_was_closed_is_an_error_of_ours(cluster, model, tmp_path):
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        workers = client.get_executor(pure=False)
    for jobs in (None, 2):
        with pytest.raises(WorkersLostError, match="do not answer"):
            convert_checkpoint(model, cache_dir=tmp_path / "c", executor=workers, jobs=jobs)


HURRY = """
import sys
from paroquant_stream.cli import convert, common as exits
from paroquant_stream.execution import executors as executor
executor.CONNECT_TIMEOUT = 0.2
exits.end_with(convert.main)
"""


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x"])
def test_a_scheduler_that_was_never_there_is_one_message_and_the_command_ends(model, address):
    command = [sys.executable, "-c", HURRY, str(model), "--executor", "dask", "--scheduler"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=15)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {address}: no Dask scheduler answers")
    assert done.stderr.count("\n") == 1


def test_a_scheduler_that_dies_is_one_message_and_the_next_run_goes_on(
    model, right, tmp_path_factory, tmp_path
):
    cache = tmp_path / "cache"
    with LoopbackCluster(tmp_path_factory.mktemp("dying"), workers=1) as cluster:
        cluster.arm(cluster.scheduler.pid)
        code, found = run(*arguments(cluster, model, cache))
        assert cluster.fired().startswith(f"{cluster.scheduler.pid} ['")  # with a temp in work
        assert cluster.scheduler.wait(10) == -9
    assert code == 1
    assert found.startswith(f"error: the Dask scheduler ({cluster.address}) or its workers failed")
    assert found.endswith("run again to resume\n")
    assert found.count("\n") == 1
    convert_checkpoint(model, cache_dir=cache)
    assert entries(cache) == right


def test_a_cluster_whose_last_worker_is_gone_is_one_message(
    model, tmp_path_factory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(executor, "CONNECT_TIMEOUT", 0.5)
    with LoopbackCluster(tmp_path_factory.mktemp("lonely"), workers=1) as cluster:
        cluster.arm()
        assert main(arguments(cluster, model, tmp_path / "cache")) == 1
        assert cluster.fired()
    assert "its workers do not answer (" in capsys.readouterr().err


def test_a_cluster_without_workers_is_one_message(
    model, tmp_path_factory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(executor, "CONNECT_TIMEOUT", 0.5)
    with LoopbackCluster(tmp_path_factory.mktemp("empty"), workers=0) as cluster:
        for more in ([], ["--jobs", "2"]):
            assert main(arguments(cluster, model, tmp_path / "cache", *more)) == 1
            assert "its workers do not answer (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--executor", "dask"],
        ["--scheduler", "tcp://x:1"],
        ["--executor", "process", "--scheduler", "tcp://x:1"],
    ],
)
def test_a_scheduler_goes_with_dask_and_dask_with_a_scheduler(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["model", *wrong])
    assert stop.value.code == 2
    assert "--executor dask and --scheduler ADDRESS go together" in capsys.readouterr().err


def test_without_distributed_the_extra_is_named(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([str(model), "--executor", "dask", "--scheduler", "tcp://x:1"]) == 1
    assert "pip install 'paroquant_stream[dask]'" in capsys.readouterr().err


class Counting(ThreadPoolExecutor):
    """How many calls it had at once at most."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.now: set[Future] = set()
        self.most = 0

    def submit(self, *call, **options) -> Future:
        future = super().submit(*call, **options)
        self.now = {f for f in self.now if not f.done()} | {future}
        self.most = max(self.most, len(self.now))
        return future


def test_jobs_bound_what_an_executor_has_at_once(model, right, tmp_path):
    with Counting(6) as pool:
        convert_checkpoint(model, cache_dir=tmp_path / "cache", executor=pool, jobs=2)
    assert entries(tmp_path / "cache") == right
    assert pool.most <= 2


def test_the_trace_has_every_shard(model, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        convert_checkpoint(model, executor=pool, trace=tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text().count('"name": "shard"') == 6


@contextmanager
def sent(model, cache):
    """A job as it is sent, and the sign of its run."""
    request = make_request(model, cache_dir=cache)
    request.store.create()
    plan = plan_model(request).plan
    with request.store.new_file(0) as sign:
        yield Job(plan.tasks[0], request.source.directory, request.store), sign.path


def test_an_error_on_another_host_names_it(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, sign):
        lost = replace(job, directory=tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"^(?!on )") as here:
            run_remote(lost, sign, os.uname().nodename)
        with pytest.raises(CheckpointError, match=f"^on {os.uname().nodename}: ") as there:
            run_remote(lost, sign, "another")
    assert str(there.value).endswith(str(here.value))


def test_a_worker_that_does_not_see_the_sign_does_nothing(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, sign):
        pass
    with pytest.raises(WorkersUnfitError, match=re.escape(str(sign))):
        run_remote(job, sign, os.uname().nodename)
    assert not entries(tmp_path / "cache")


def test_a_thread_keeps_its_memory_from_shard_to_shard(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, sign), ThreadPoolExecutor(1) as pool:
        places = pool.submit(elsewhere._thread_slots).result()
        before = Slot(places)
        memory = before.buffers
        before.release()
        for _ in range(2):
            pool.submit(run_remote, job, sign, os.uname().nodename).result(20)
        assert pool.submit(elsewhere._thread_slots).result() is places
        assert Slot(places).buffers is memory
        assert elsewhere._thread_slots() is not places


def test_a_worker_needs_no_lock(model, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    with sent(model, tmp_path / "cache") as (job, sign):
        monkeypatch.setattr(fcntl, "flock", unsupported)
        monkeypatch.setattr(
            "paroquant_stream.store.store.Store.lock", lambda *_: pytest.fail("asked")
        )
        run_remote(job, sign, os.uname().nodename)
    assert len(entries(tmp_path / "cache")) == 1


def test_a_worker_stops_when_its_run_has_ended_and_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "POLL_SECONDS", 0)
    looks = []

    def look(sign):
        looks.append(sign)
        if len(looks) == 3:
            sign.unlink()
        return sign.exists()

    monkeypatch.setattr(elsewhere, "_lease_exists", look)
    with sent(model, tmp_path / "cache") as (job, sign), pytest.raises(RunCancelledError):
        run_remote(job, sign, os.uname().nodename)
    assert len(looks) == 3
    assert not entries(tmp_path / "cache")
    assert not temps(tmp_path / "cache")


def test_a_forking_pool_is_refused(model):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pool, refused = ProcessPoolExecutor(1, get_context("fork")), r"get_context\('spawn'\)"
    with pool, pytest.raises(WorkersUnfitError, match=refused):
        convert_checkpoint(model, executor=pool)


def test_what_travels_is_small(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, sign):
        outcome = run_remote(job, sign, os.uname().nodename)
        parts = sum(len(s) for operation in job.task.operations for s in operation.slices)
        assert len(pickle.dumps(job)) < 250 * parts + 1000
        assert len(pickle.dumps(outcome)) < 150 * len(outcome.record.tensors) + 1000
