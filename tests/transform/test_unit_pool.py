"""A shard is converted on an executor for as long as its run has a lease file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
from paroquant_stream.execution.slots import Slot
from paroquant_stream.transform.remote_runner import Lease, run_remote, runner

from paroquant_stream import convert_checkpoint
from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    CheckpointError,
    RunCancelledError,
    WorkersUnfitError,
)
from paroquant_stream.execution import executors
from paroquant_stream.execution.processes import processes
from paroquant_stream.transform import remote_runner
from paroquant_stream.transform.task_runner import Job, run_task
from tests.helpers import slow_worker
from tests.helpers.builders import cut_apart, write_checkpoint
from tests.helpers.cache_files import entries, temps

HOST = os.uname().nodename


@pytest.fixture
def model(tmp_path):
    """Write six shards with parts of the same linears."""
    return write_checkpoint(tmp_path / "model", cut=cut_apart(6))


@contextmanager
def sent(model, cache):
    """Provide a job as it is sent, and the lease file of its run."""
    request = make_request(model, cache_dir=cache)
    request.store.create()
    plan = plan_model(request).plan
    with request.store.new_file(0) as lease:
        place = Lease(lease.path, 0, HOST)
        yield Job(plan.tasks[0], request.source.directory, request.store), place


class Counting(ThreadPoolExecutor):
    """Counts the calls that it has at once."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.now: set[Future] = set()
        self.most = 0

    def submit(self, *call, **options) -> Future:
        future = super().submit(*call, **options)
        self.now = {f for f in self.now if not f.done()} | {future}
        self.most = max(self.most, len(self.now))
        return future


def test_jobs_bound_the_calls_on_an_executor(model, tmp_path):
    convert_checkpoint(model, cache_dir=tmp_path / "right", jobs=1)
    with Counting(6) as pool:
        convert_checkpoint(model, cache_dir=tmp_path / "cache", executor=pool, jobs=2)
    assert entries(tmp_path / "cache") == entries(tmp_path / "right")
    assert pool.most <= 2


def test_the_trace_has_every_shard(model, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        convert_checkpoint(model, executor=pool, trace=tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text().count('"name": "shard"') == 6


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
    monkeypatch.setattr(remote_runner, "POLL_SECONDS", 0)
    with sent(model, tmp_path / "cache") as (job, lease):
        second = replace(lease, number=1)
        run_remote(job, second)
        found = [remote_runner._read_count(each) for each in (lease, second)]  # private: the bar's
    assert found[0] == 0
    assert job.task.size < found[1] <= 2 * job.task.size  # hashed and converted


def test_progress_of_worker_processes_moves_within_a_shard(tmp_path, monkeypatch):
    model, seen = write_checkpoint(tmp_path / "model"), []
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(remote_runner, "run_remote", slow_worker.steady)
    with processes(1) as pool:
        convert_checkpoint(model, executor=pool, progress=lambda *given: seen.append(given))
    (size,) = {size for _, _, size in seen}
    assert any(0 < done < size for _, done, _ in seen)
    assert seen[-1] == ("model.safetensors", size, size)


def test_a_lease_that_cannot_be_read_only_stops_the_bar(model, tmp_path):
    with sent(model, tmp_path / "cache") as (_, lease):
        pass
    assert remote_runner._read_count(lease) == 0  # private: the bar's
    remote_runner._write_count(lease, 5)
    assert not lease.path.exists()


def test_without_an_executor_the_runner_is_run_task(model, tmp_path):
    with runner(None, model, make_request(model).store) as run:
        assert run is run_task


def test_the_lease_is_removed_with_the_run(model, tmp_path):
    store = make_request(model, cache_dir=tmp_path / "cache").store
    store.create()
    with ThreadPoolExecutor(1) as pool, runner(pool, model, store):
        assert len(temps(tmp_path / "cache")) == 1
    assert not temps(tmp_path / "cache")


def test_a_worker_has_absolute_paths(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = make_request("model", cache_dir="cache").store
    store.create()
    found = []

    def record(job, lease):
        found.extend((job.directory, job.store.root, lease.path))
        return None, []

    monkeypatch.setattr(remote_runner, "run_remote", record)
    with sent(model, "cache") as (job, _), ThreadPoolExecutor(1) as pool:
        directory = model.relative_to(tmp_path)
        with runner(pool, directory, store) as run:
            run(replace(job, directory=directory, store=store), Slot(), lambda _: None)
    assert [path.is_absolute() for path in found] == [True] * 3


def test_only_an_error_on_another_host_names_the_host(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, lease):
        lost = replace(job, directory=tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"^(?!on )") as here:
            run_remote(lost, lease)
        with pytest.raises(CheckpointError, match=f"^on {HOST}: ") as there:
            run_remote(lost, replace(lease, host="another"))
    assert str(there.value).endswith(str(here.value))


def test_a_worker_that_does_not_see_the_lease_converts_nothing(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, lease):
        pass
    with pytest.raises(WorkersUnfitError, match=re.escape(str(lease.path))):
        run_remote(job, lease)
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
        found = remote_runner._lease_exists(tmp_path)  # private: decides that a run has ended
    assert found is exists


@pytest.fixture
def thread_slots(monkeypatch):
    """Give this thread new slots, as a thread of a worker has."""
    monkeypatch.setattr(remote_runner, "_thread", threading.local())  # private: holds them
    return remote_runner._thread_slots  # private: what keeps a worker's memory bounded


def test_a_thread_keeps_its_buffers_from_shard_to_shard(model, tmp_path, thread_slots):
    slots = thread_slots()
    before = Slot(slots)
    memory = before.buffers
    before.release()
    with sent(model, tmp_path / "cache") as (job, lease):
        for _ in range(2):
            run_remote(job, lease)
    assert thread_slots() is slots
    assert Slot(slots).buffers is memory
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(thread_slots).result() is not slots


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_releases_its_slot(model, tmp_path, thread_slots, fails):
    with sent(model, tmp_path / "cache") as (job, lease):
        lost = replace(job, directory=tmp_path / "nowhere")
        with pytest.raises(CheckpointError) if fails else nullcontext():
            run_remote(lost if fails else job, lease)
    assert thread_slots().try_acquire() is not None


def test_a_worker_needs_no_lock(model, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with sent(model, tmp_path / "cache") as (job, lease):
        monkeypatch.setattr(fcntl, "flock", unsupported)
        monkeypatch.setattr(
            "paroquant_stream.store.store.Store.lock", lambda *_: pytest.fail("locked")
        )
        run_remote(job, lease)
    assert len(entries(tmp_path / "cache")) == 1


def test_a_worker_stops_when_its_run_has_ended(model, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_runner, "POLL_SECONDS", 0)
    checks = []

    def check(lease):
        checks.append(lease)
        if len(checks) == 3:
            lease.unlink()
        return lease.exists()

    monkeypatch.setattr(remote_runner, "_lease_exists", check)  # private: counts the checks
    with sent(model, tmp_path / "cache") as (job, lease), pytest.raises(RunCancelledError):
        run_remote(job, lease)
    assert len(checks) == 3
    assert not entries(tmp_path / "cache")
    assert not temps(tmp_path / "cache")


def test_the_lease_is_not_checked_after_every_chunk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_runner, "POLL_SECONDS", 3600)
    checks = []

    def check(lease):
        checks.append(lease)
        return True

    monkeypatch.setattr(remote_runner, "_lease_exists", check)  # private: counts the checks
    with sent(model, tmp_path / "cache") as (job, lease):
        run_remote(job, lease)
    assert len(checks) == 1


def test_a_forking_pool_is_refused(model):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pool, refused = ProcessPoolExecutor(1, get_context("fork")), r"get_context\('spawn'\)"
    with pool, pytest.raises(WorkersUnfitError, match=refused):
        convert_checkpoint(model, executor=pool)


def test_jobs_and_outcomes_are_small_when_pickled(model, tmp_path):
    with sent(model, tmp_path / "cache") as (job, lease):
        outcome, _ = run_remote(job, lease)
        parts = sum(len(s) for operation in job.task.operations for s in operation.slices)
        assert len(pickle.dumps(job)) < 250 * parts + 1000
        assert len(pickle.dumps(outcome)) < 150 * len(outcome.record.tensors) + 1000
