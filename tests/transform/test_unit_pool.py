"""Units run inline, in threads, or on an executor for as long as their run has a lease file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from paroquant_stream import convert_checkpoint
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    CheckpointError,
    RunCancelledError,
    WorkersUnfitError,
)
from paroquant_stream.execution import executors
from paroquant_stream.execution.processes import processes
from paroquant_stream.trace import NO_TRACE
from paroquant_stream.transform import unit_pool as module
from paroquant_stream.transform.task_runner import run_task
from paroquant_stream.transform.unit import UnitResult, units_of
from paroquant_stream.transform.unit_pool import (
    Lease,
    RemotePool,
    ThreadedPool,
    UnitPool,
    run_remote,
    unit_pool,
)
from tests.helpers import slow_worker
from tests.helpers.builders import cut_apart, write_checkpoint
from tests.helpers.cache_files import entries, temps
from tests.helpers.units import ignore, jobs_of, make_small, whole_unit

HOST = os.uname().nodename


@pytest.fixture
def model(tmp_path):
    """Write six shards with parts of the same linears."""
    return write_checkpoint(tmp_path / "model", cut=cut_apart(6))


@contextmanager
def sent(model, cache):
    """Provide a unit as it is sent, and the lease of its run."""
    job = jobs_of(model, cache)[0]
    with whole_unit(job) as unit, job.store.new_file(0) as lease:
        yield unit, Lease(lease.path, 0, HOST)


class Foreign(Executor):
    """Any executor that is not one of threads, as this module knows it."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads)
        self._max_workers = threads
        self.now: set[Future] = set()
        self.most = self.calls = 0

    def submit(self, *call, **options) -> Future:
        future = self._threads.submit(*call, **options)
        self.now = {f for f in self.now if not f.done()} | {future}
        self.most = max(self.most, len(self.now))
        self.calls += 1
        return future

    def shutdown(self, *given, **options) -> None:
        self._threads.shutdown(*given, **options)


def test_jobs_bound_the_calls_on_an_executor(model, tmp_path, monkeypatch):
    make_small(monkeypatch)
    convert_checkpoint(model, cache_dir=tmp_path / "right", jobs=1)
    with Foreign(6) as pool:
        convert_checkpoint(model, cache_dir=tmp_path / "cache", executor=pool, jobs=2)
    assert entries(tmp_path / "cache") == entries(tmp_path / "right")
    assert pool.calls > 6
    assert pool.most <= 2 + 3  # and one that waits for each shard in work


@pytest.fixture
def lone(tmp_path, monkeypatch):
    """The job of one shard of many small units."""
    make_small(monkeypatch)
    return jobs_of(write_checkpoint(tmp_path / "lone"), tmp_path / "cache")[0]


@pytest.mark.parametrize("kind", ["threads", "executor"])
def test_a_lone_shard_uses_all_jobs(lone, monkeypatch, kind):
    together, lock, calls = threading.Barrier(4, timeout=30), threading.Lock(), []
    real = module.run_unit

    def meet(*given, **options):
        with lock:
            calls.append(1)
            first = len(calls) <= 4
        if first:
            together.wait()  # passes only if four run at once
        return real(*given, **options)

    monkeypatch.setattr(module, "run_unit", meet)
    executor = Foreign(4) if kind == "executor" else None
    with unit_pool(executor, 4, lone.directory, lone.store) as pool:
        assert run_task(lone, pool, ignore).converted
    assert len(calls) > 20
    if executor:
        executor.shutdown()


def test_shards_in_work_share_the_jobs(lone):
    pool = UnitPool(5)
    assert pool._ahead() == 1 + 5  # private: how many units of a shard are sent ahead
    with pool._calling(), pool._calling():
        assert pool._ahead() == 1 + 3
    assert pool._ahead() == 1 + 5


@pytest.mark.parametrize("kind", ["inline", "threads", "executor"])
def test_every_kind_of_pool_gives_the_same_entry(lone, kind):
    with unit_pool(None, 1, lone.directory, lone.store) as pool:
        right = run_task(replace(lone, split=False), pool, ignore).record
    data = lone.store.entry_path(right.key).read_bytes()
    lone.store.entry_path(right.key).unlink()
    executor, jobs = Foreign(3) if kind == "executor" else None, 1 if kind == "inline" else 3
    with unit_pool(executor, jobs, lone.directory, lone.store) as pool:
        assert run_task(replace(lone, force=True), pool, ignore).record == right
    assert lone.store.entry_path(right.key).read_bytes() == data


@pytest.mark.parametrize("kind", ["inline", "threads", "executor"])
def test_a_tick_that_raises_ends_every_unit(lone, monkeypatch, kind):
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    executor, jobs = Foreign(3) if kind == "executor" else None, 1 if kind == "inline" else 3
    lock, left = threading.Lock(), [30]

    def stop(_count):
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise RunCancelledError("stop")

    with pytest.raises(RunCancelledError):
        with unit_pool(executor, jobs, lone.directory, lone.store) as pool:
            while True:  # until it is stopped, however fast the workers are
                run_task(replace(lone, force=True), pool, stop)
    if executor:
        executor.shutdown()
    assert not temps(lone.store.root)


def test_the_trace_has_every_shard(model, tmp_path):
    with Foreign(2) as pool:
        convert_checkpoint(model, executor=pool, trace=tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text().count('"name": "shard"') == 6


@pytest.mark.slow
def test_the_trace_has_the_stages_of_worker_processes(model, tmp_path):
    with processes(1) as pool:
        convert_checkpoint(model, executor=pool, trace=tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    hashed = [rows[event["tid"]] for event in events if event["name"] == "hash"]
    assert len(hashed) >= 6
    assert len(set(hashed)) == 1
    assert hashed[0].startswith("process ")
    starts = [event["ts"] for event in events if event["ph"] == "X"]
    assert min(starts) >= 0  # one clock


def test_a_worker_reports_the_bytes_that_it_has_done(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    with sent(model, tmp_path / "cache") as (unit, lease):
        second = replace(lease, number=1)
        run_remote(unit, second)
        found = [module._read_counts([each]) for each in (lease, second)]  # private: the bar's
        size = (unit.directory / unit.shard).stat().st_size
        assert module._read_counts([lease, second]) == sum(found)
    assert found[0] == 0
    assert size < found[1] <= 2 * size  # hashed and converted


@pytest.mark.slow
def test_progress_of_worker_processes_moves_within_a_shard(tmp_path, monkeypatch):
    model, seen = write_checkpoint(tmp_path / "model"), []
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    with processes(1) as pool:
        monkeypatch.setattr(module, "run_remote", slow_worker.steady)
        convert_checkpoint(model, executor=pool, progress=lambda *given: seen.append(given))
    (size,) = {size for _, _, size in seen}
    assert any(0 < done < size for _, done, _ in seen)
    assert seen[-1] == ("model.safetensors", size, size)


def test_a_lease_that_cannot_be_read_only_stops_the_bar(model, tmp_path):
    with sent(model, tmp_path / "cache") as (_, lease):
        pass
    assert module._read_counts([lease]) == 0  # private: the bar's
    module._write_count(lease, 5)
    assert not lease.path.exists()


def pool_for(model, executor, jobs):
    store = make_request(model).store
    store.create()
    return unit_pool(executor, jobs, model, store)


def test_the_kind_of_pool_is_that_of_the_executor(model):
    with pool_for(model, None, 1) as pool:
        assert type(pool) is UnitPool
    with pool_for(model, None, 2) as pool:
        assert type(pool) is ThreadedPool
    with ThreadPoolExecutor(1) as threads, pool_for(model, threads, 2) as pool:
        assert type(pool) is ThreadedPool
    with Foreign(1) as foreign, pool_for(model, foreign, 1) as pool:
        assert type(pool) is RemotePool


def test_the_lease_is_removed_with_the_run(model, tmp_path):
    store = make_request(model, cache_dir=tmp_path / "cache").store
    store.create()
    with Foreign(1) as executor, unit_pool(executor, 1, model, store):
        assert len(temps(tmp_path / "cache")) == 1
    assert not temps(tmp_path / "cache")


def test_a_worker_has_absolute_paths(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []

    def record(unit, lease):
        found.extend((unit.directory, unit.store.root, unit.path, lease.path))
        return UnitResult(), []

    monkeypatch.setattr(module, "run_remote", record)
    with sent(model.relative_to(tmp_path), "cache") as (unit, _), Foreign(1) as executor:
        directory = model.relative_to(tmp_path)
        with unit_pool(executor, 1, directory, unit.store) as pool:
            list(pool.run([replace(unit, directory=directory)], ignore))
    assert [path.is_absolute() for path in found] == [True] * 4


def test_only_an_error_on_another_host_names_the_host(model, tmp_path):
    with sent(model, tmp_path / "cache") as (unit, lease):
        lost = replace(unit, directory=tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"^(?!on )") as here:
            run_remote(lost, lease)
        with pytest.raises(CheckpointError, match=f"^on {HOST}: ") as there:
            run_remote(lost, replace(lease, host="another"))
    assert str(there.value).endswith(str(here.value))


def test_a_worker_that_does_not_see_the_lease_converts_nothing(model, tmp_path):
    with sent(model, tmp_path / "cache") as (unit, lease):
        pass
    with pytest.raises(WorkersUnfitError, match=re.escape(str(lease.path))):
        run_remote(unit, lease)
    assert not entries(tmp_path / "cache")


@pytest.mark.parametrize(
    ("number", "exists"),
    [
        (errno.ENOENT, False),
        (errno.ENOTDIR, False),
        (errno.EACCES, False),
        (errno.EIO, True),  # a server that does not answer now
        (errno.ESTALE, True),
    ],
)
def test_only_some_errors_mean_that_the_lease_was_removed(tmp_path, monkeypatch, number, exists):
    def fail(_path):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:  # pytest itself needs os.stat to report a failure
        patch.setattr(os, "stat", fail)
        found = module._lease_exists(tmp_path)  # private: decides that a run has ended
    assert found is exists


@pytest.fixture
def thread_buffers(monkeypatch):
    """Give this thread no buffers yet, as a new thread of a worker has."""
    monkeypatch.setattr(module, "_thread", threading.local())  # private: holds them
    return module._thread_buffers  # private: what keeps a worker's memory bounded


def test_a_thread_keeps_its_buffers_from_unit_to_unit(model, tmp_path, thread_buffers):
    buffers = thread_buffers()
    with sent(model, tmp_path / "cache") as (unit, lease):
        for _ in range(2):
            run_remote(unit, lease)
    assert thread_buffers() is buffers
    assert len(buffers._buffers[0]) > 0  # private: they were used
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(thread_buffers).result() is not buffers


def test_a_pool_without_threads_keeps_its_buffers(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "run_unit", lambda _unit, _tick, buffers, _trace: seen.append(buffers)
    )
    pool, other = UnitPool(1), UnitPool(1)
    for each in (pool, pool, other):  # shard after shard
        list(each.run([None, None], ignore))
    assert all(buffers is seen[0] for buffers in seen[:4])
    assert seen[4] is seen[5] is not seen[0]


def test_a_worker_needs_no_lock(model, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with sent(model, tmp_path / "cache") as (unit, lease):
        monkeypatch.setattr(fcntl, "flock", unsupported)
        monkeypatch.setattr(
            "paroquant_stream.store.store.Store.lock", lambda *_: pytest.fail("locked")
        )
        assert run_remote(unit, lease)[0].digest


def test_a_worker_stops_when_its_run_has_ended(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    checks = []

    def check(lease):
        checks.append(lease)
        if len(checks) == 3:
            lease.unlink()
        return lease.exists()

    monkeypatch.setattr(module, "_lease_exists", check)  # private: counts the checks
    with sent(model, tmp_path / "cache") as (unit, lease), pytest.raises(RunCancelledError):
        run_remote(unit, lease)
    assert len(checks) == 3
    assert not entries(tmp_path / "cache")
    assert not temps(tmp_path / "cache")


def test_the_lease_is_not_checked_after_every_chunk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 3600)
    checks = []

    def check(lease):
        checks.append(lease)
        return True

    monkeypatch.setattr(module, "_lease_exists", check)  # private: counts the checks
    with sent(model, tmp_path / "cache") as (unit, lease):
        run_remote(unit, lease)
    assert len(checks) == 1


def test_a_forking_pool_is_refused(model):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pool, refused = ProcessPoolExecutor(1, get_context("fork")), r"get_context\('spawn'\)"
    with pool, pytest.raises(WorkersUnfitError, match=refused):
        convert_checkpoint(model, executor=pool)


def test_a_call_is_small_when_pickled(lone):
    with whole_unit(lone) as unit, lone.store.new_file(0) as file:
        lease = Lease(file.path, 0, HOST)
        for each in units_of(unit, split=True):
            parts = sum(len(s) for step in each.steps for s in step.operation.slices)
            bound = 350 * parts + 30 * len(each.hashed or ()) + 2000
            assert len(pickle.dumps((run_remote, each, lease))) < bound


def test_a_shard_is_hashed_here_and_on_a_cluster_by_a_worker(model, tmp_path):
    pool = Foreign(1)
    with sent(model, tmp_path / "cache") as (unit, lease):
        only_hash = replace(unit, steps=(), path=None)
        ours = RemotePool(1, NO_TRACE, pool, lease.path).hash(only_hash, ignore)
        assert pool.calls == 0
        cluster = module.ClusterPool(1, NO_TRACE, pool, lease.path)
        assert cluster.hash(only_hash, ignore) == ours
    assert pool.calls == 1
