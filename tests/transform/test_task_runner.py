"""A job converts one shard and publishes its entry, or stores nothing."""

from __future__ import annotations

import os
import pickle
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from paroquant_stream.execution.slots import Slot, SlotPool
from safetensors.numpy import load_file

from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import RunCancelledError, SourceChangedError, StoreError
from paroquant_stream.files.tensor_writer import PAGE, lay_out
from paroquant_stream.store.manifest import EntryRecord
from paroquant_stream.store.store import Store
from paroquant_stream.transform import task_runner
from paroquant_stream.transform.source import Source
from paroquant_stream.transform.task_runner import Job, Outcome, run_task
from tests.helpers.builders import flip, llama_tensors


@pytest.fixture
def jobs(scattered_dir) -> list[Job]:
    request = make_request(scattered_dir)
    request.store.create()
    plan = plan_model(request).plan
    return [Job(task, request.source.directory, request.store) for task in plan.tasks]


def ignore(_count: int) -> None:
    pass


def test_safetensors_reads_the_entry_as_recorded(jobs):
    tensors = llama_tensors()
    for job in jobs:
        record = run_task(job, Slot(), ignore).record
        arrays = load_file(job.store.entry_path(record.key))
        assert {(n, a.shape) for n, a in arrays.items()} == {
            (t.name, t.shape) for t in record.tensors
        }
        for name, array in arrays.items():
            quantized = "embed" in name or "head" in name or name.endswith(".scales")
            if name in tensors and not quantized:
                assert array.tobytes() == tensors[name].tobytes()


def test_data_starts_on_a_page(jobs):
    record = run_task(jobs[0], Slot(), ignore).record
    header, _ = lay_out(record.tensors)
    assert len(header) % PAGE == 0
    assert jobs[0].store.entry_path(record.key).read_bytes().startswith(header)


def test_an_entry_removed_at_once_is_only_not_cached(jobs, monkeypatch):
    def gone(self, key):
        raise StoreError("pruned")

    monkeypatch.setattr(Store, "open_entry", gone)
    assert run_task(jobs[0], Slot(), ignore).converted


def test_biases_use_scales_of_another_shard(jobs):
    tensors = llama_tensors()
    borrowers = [job for job in jobs if job.task.borrowed]
    assert borrowers
    for job in borrowers:
        arrays = load_file(job.store.entry_path(run_task(job, Slot(), ignore).record.key))
        for name in (n for n in arrays if n.endswith("_proj.biases")):
            scales = tensors[name.replace("biases", "scales")]
            zeros = tensors[name.replace("biases", "qzeros")].view(np.uint32)
            first = -(scales[0, 0].astype(np.float32) * np.float32(zeros[0, 0] & 15)).astype(
                np.float16
            )
            assert arrays[name][0, 0] == first


def test_jobs_and_outcomes_can_be_pickled(jobs):
    assert len(pickle.dumps(jobs)) < 100_000
    outcome = run_task(pickle.loads(pickle.dumps(jobs[0])), Slot(), ignore)
    assert isinstance(pickle.loads(pickle.dumps(outcome)), Outcome)
    assert len(pickle.dumps(outcome)) < 20_000


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tick", [1, 5, 20])
def test_a_cancelled_task_leaves_nothing(jobs, threads, tick):
    ticks = []

    def stop(_count):
        ticks.append(1)
        if len(ticks) >= tick:
            raise RunCancelledError("stop")

    with pytest.raises(RunCancelledError):
        run_task(jobs[0], Slot(SlotPool(threads)), stop)
    assert not list(jobs[0].store.root.rglob("*.safetensors"))
    assert not list((jobs[0].store.root / "v1" / "tmp").iterdir())


@pytest.mark.parametrize("threads", [1, 2])
def test_every_byte_is_counted_for_hash_and_conversion(jobs, threads):
    ticks: list[int] = []
    run_task(jobs[0], Slot(SlotPool(threads)), ticks.append)
    task = jobs[0].task
    parts = [part for op in task.operations for parts in op.slices for part in parts]
    converted = sum(part.stop - part.start for part in parts if part.shard == task.shard)
    assert sum(ticks) == task.size + converted


def converted(job: Job) -> EntryRecord:
    return run_task(job, Slot(), ignore).record


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_an_entry_of_the_store_is_not_converted_again(jobs):
    record = converted(jobs[0])
    outcome = run_task(replace(jobs[0], known=record), Slot(), ignore)
    assert outcome.record == record
    assert not outcome.converted


def test_force_converts_an_entry_of_the_store_again(jobs):
    record = converted(jobs[0])
    outcome = run_task(replace(jobs[0], known=record, force=True), Slot(), ignore)
    assert outcome.record == record
    assert outcome.converted


def test_only_a_record_of_the_same_size_is_hashed_first(jobs, monkeypatch):
    monkeypatch.setattr(Source, "may_be_known", lambda _: False)
    record = converted(jobs[0])
    moved = replace(record, source_size=record.source_size + 1)
    assert run_task(replace(jobs[0], known=moved), Slot(), ignore).converted
    assert not run_task(replace(jobs[0], known=record), Slot(), ignore).converted


def test_an_entry_of_another_size_than_recorded_is_checked(jobs, monkeypatch):
    record = converted(jobs[0])
    checked = []
    monkeypatch.setattr(task_runner, "confirmed_defect", lambda *_: checked.append(1))
    for size in (record.size, record.size + 1):
        known = replace(record, size=size)
        assert converted(replace(jobs[0], known=known)) == record
        assert len(checked) == size - record.size


def test_an_adopted_entry_is_synced(jobs, monkeypatch):
    record, synced = converted(jobs[0]), []
    real = Store.sync_entry
    monkeypatch.setattr(Store, "sync_entry", lambda s, key: synced.append(key) or real(s, key))
    outcome = run_task(jobs[0], Slot(), ignore)
    assert (outcome.record, outcome.converted) == (record, False)
    assert synced == [record.key]


def test_a_damaged_entry_without_a_record_is_converted_again(jobs):
    record = converted(jobs[0])
    path = jobs[0].store.entry_path(record.key)
    right = path.read_bytes()
    flip(path, len(right) - 1)
    outcome = run_task(jobs[0], Slot(), ignore)
    assert outcome.converted
    assert path.read_bytes() == right


@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_that_is_not_as_hashed_is_not_stored(jobs, monkeypatch, threads):
    def changed(_source):
        raise SourceChangedError("changed")

    monkeypatch.setattr(Source, "check", changed)
    with pytest.raises(SourceChangedError):
        run_task(jobs[0], Slot(SlotPool(threads)), ignore)
    assert not list(jobs[0].store.root.rglob("*.safetensors"))


@pytest.mark.parametrize("fails", [False, True])
def test_no_descriptor_remains_open(jobs, fails):
    borrower = next(job for job in jobs if job.task.borrowed)

    def tick(_count):
        if fails:
            raise RunCancelledError("stop")

    before = open_descriptors()
    with pytest.raises(RunCancelledError) if fails else nullcontext():
        run_task(borrower, Slot(), tick)
    assert open_descriptors() == before


def test_a_new_entry_need_not_be_hashed_when_it_is_loaded(jobs, settled):
    record = converted(jobs[0])
    with jobs[0].store.entry_path(record.key).open("rb") as file:
        assert jobs[0].store.digest_cache.lookup(file.fileno()) == record.digest


def test_an_entry_without_a_digest_is_converted_again(jobs, monkeypatch):
    record = converted(jobs[0])
    monkeypatch.setattr(Store, "entry_digest", lambda *_: None)
    monkeypatch.setattr(task_runner, "confirmed_defect", lambda *_: None)
    outcome = run_task(jobs[0], Slot(), ignore)
    assert (outcome.record, outcome.converted) == (record, True)
