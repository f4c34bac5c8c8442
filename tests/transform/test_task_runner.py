"""A job converts one shard and publishes its entry, or stores nothing."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import RunCancelledError, SourceChangedError, StoreError
from paroquant_stream.files.tensor_writer import PAGE, lay_out
from paroquant_stream.store.manifest import EntryRecord
from paroquant_stream.store.store import Store
from paroquant_stream.trace import NO_TRACE
from paroquant_stream.transform import task_runner
from paroquant_stream.transform.source_shard import SourceShard
from paroquant_stream.transform.task_runner import Job, Outcome, run_task
from paroquant_stream.transform.unit_pool import RemotePool, ThreadedPool, UnitPool
from tests.helpers.builders import cut_apart, flip, llama_tensors, write_checkpoint
from tests.helpers.cache_files import digest_of
from tests.helpers.units import Ordered, jobs_of, make_small


@pytest.fixture
def jobs(scattered_dir) -> list[Job]:
    request = make_request(scattered_dir)
    request.store.create()
    plan = plan_model(request).plan
    return [Job(task, request.source.directory, request.store) for task in plan.tasks]


def ignore(_count: int) -> None:
    pass


@contextmanager
def pool_of(threads: int) -> Iterator[UnitPool]:
    """Inline, or in threads."""
    if threads == 1:
        yield UnitPool(1)
        return
    with ThreadPoolExecutor(threads) as executor:
        yield ThreadedPool(threads, NO_TRACE, executor)


def test_safetensors_reads_the_entry_as_recorded(jobs):
    tensors = llama_tensors()
    for job in jobs:
        record = run_task(job, UnitPool(1), ignore).record
        arrays = load_file(job.store.entry_path(record.key))
        assert {(n, a.shape) for n, a in arrays.items()} == {
            (t.name, t.shape) for t in record.tensors
        }
        for name, array in arrays.items():
            quantized = "embed" in name or "head" in name or name.endswith(".scales")
            if name in tensors and not quantized:
                assert array.tobytes() == tensors[name].tobytes()


class Copied:
    """A copy of an entry: its bytes from the first tensor on."""

    def __init__(self, tensors) -> None:
        self.start = tensors[0].start
        self.data = bytearray(tensors[-1].stop - self.start)

    def put(self, offset: int, chunk: memoryview) -> None:
        at = offset - self.start
        self.data[at : at + len(chunk)] = chunk


@pytest.mark.parametrize("threads", [1, 3])
def test_a_copy_gets_the_bytes_of_the_entry(scattered_dir, monkeypatch, threads):
    make_small(monkeypatch)
    for job in jobs_of(scattered_dir):
        with pool_of(threads) as pool:
            done = run_task(replace(job, begin_copy=Copied), pool, ignore)
            again = run_task(replace(job, begin_copy=pytest.fail), pool, ignore)
        entry = job.store.entry_path(done.record.key).read_bytes()
        assert done.copy.start < len(entry)
        assert entry[done.copy.start :] == done.copy.data
        assert (again.converted, again.copy) == (False, None)


def test_of_what_other_processes_write_no_copy_is_begun(jobs):
    class Elsewhere(UnitPool):
        is_here = False

    assert not RemotePool.is_here
    done = run_task(replace(jobs[0], begin_copy=pytest.fail), Elsewhere(1), ignore)
    assert (done.converted, done.copy) == (True, None)


def test_data_starts_on_a_page(jobs):
    record = run_task(jobs[0], UnitPool(1), ignore).record
    header, _ = lay_out(record.tensors)
    assert len(header) % PAGE == 0
    assert jobs[0].store.entry_path(record.key).read_bytes().startswith(header)


def test_an_entry_removed_at_once_is_only_not_cached(jobs, monkeypatch):
    def gone(self, key):
        raise StoreError("pruned")

    monkeypatch.setattr(Store, "open_entry", gone)
    assert run_task(jobs[0], UnitPool(1), ignore).converted


def test_biases_use_scales_of_another_shard(jobs):
    tensors = llama_tensors()
    borrowers = [job for job in jobs if job.task.borrowed]
    assert borrowers
    for job in borrowers:
        arrays = load_file(job.store.entry_path(run_task(job, UnitPool(1), ignore).record.key))
        for name in (n for n in arrays if n.endswith("_proj.biases")):
            scales = tensors[name.replace("biases", "scales")]
            zeros = tensors[name.replace("biases", "qzeros")].view(np.uint32)
            first = -(scales[0, 0].astype(np.float32) * np.float32(zeros[0, 0] & 15)).astype(
                np.float16
            )
            assert arrays[name][0, 0] == first


def test_jobs_and_outcomes_can_be_pickled(jobs):
    assert len(pickle.dumps(jobs)) < 100_000
    outcome = run_task(pickle.loads(pickle.dumps(jobs[0])), UnitPool(1), ignore)
    assert isinstance(pickle.loads(pickle.dumps(outcome)), Outcome)
    assert len(pickle.dumps(outcome)) < 20_000


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tick", [1, 5, 20])
def test_a_cancelled_task_leaves_nothing(jobs, threads, tick):
    ticks = []

    def stop(_count):
        ticks.append(1)
        if len(ticks) >= tick:
            raise RunCancelledError("stop")

    with pool_of(threads) as pool, pytest.raises(RunCancelledError):
        run_task(replace(jobs[0], split=threads > 1), pool, stop)
    assert not list(jobs[0].store.root.rglob("*.safetensors"))
    assert not list((jobs[0].store.root / "v1" / "tmp").iterdir())


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("threads", [1, 2])
def test_every_byte_is_counted_for_hash_and_conversion(jobs, threads):
    ticks: list[int] = []
    with pool_of(threads) as pool:
        run_task(replace(jobs[0], split=threads > 1), pool, ticks.append)
    task = jobs[0].task
    parts = [part for op in task.operations for parts in op.slices for part in parts]
    converted = sum(part.stop - part.start for part in parts if part.shard == task.shard)
    assert sum(ticks) == task.size + converted


def converted(job: Job) -> EntryRecord:
    return run_task(job, UnitPool(1), ignore).record


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_an_entry_of_the_store_is_not_converted_again(jobs):
    record = converted(jobs[0])
    outcome = run_task(replace(jobs[0], known=record), UnitPool(1), ignore)
    assert outcome.record == record
    assert not outcome.converted


def test_force_converts_an_entry_of_the_store_again(jobs):
    record = converted(jobs[0])
    outcome = run_task(replace(jobs[0], known=record, force=True), UnitPool(1), ignore)
    assert outcome.record == record
    assert outcome.converted


def test_a_shard_that_may_be_known_is_hashed_before_it_is_converted(jobs, settled):
    record = converted(jobs[0])
    (jobs[0].directory / jobs[0].task.shard).touch()
    pool = Ordered(range, lambda *_: pytest.fail("converted"))
    outcome = run_task(jobs[0], pool, ignore)
    assert (outcome.record, outcome.converted) == (record, False)


def test_a_shard_with_another_sample_is_not_hashed_first(jobs, monkeypatch, settled):
    record = converted(jobs[0])
    flip(jobs[0].directory / jobs[0].task.shard, jobs[0].task.size - 1)
    monkeypatch.setattr(UnitPool, "hash", lambda *_: pytest.fail("hashed first"))
    outcome = run_task(replace(jobs[0], known=record), UnitPool(1), ignore)
    assert outcome.converted
    assert outcome.record.source_sha256 != record.source_sha256


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
    outcome = run_task(jobs[0], UnitPool(1), ignore)
    assert (outcome.record, outcome.converted) == (record, False)
    assert synced == [record.key]


def test_a_damaged_entry_without_a_record_is_converted_again(jobs):
    record = converted(jobs[0])
    path = jobs[0].store.entry_path(record.key)
    right = path.read_bytes()
    flip(path, len(right) - 1)
    outcome = run_task(jobs[0], UnitPool(1), ignore)
    assert outcome.converted
    assert path.read_bytes() == right


@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_that_is_not_as_hashed_is_not_stored(jobs, monkeypatch, threads):
    def changed(_source):
        raise SourceChangedError("changed")

    monkeypatch.setattr(SourceShard, "check", changed)
    with pool_of(threads) as pool, pytest.raises(SourceChangedError):
        run_task(jobs[0], pool, ignore)
    assert not list(jobs[0].store.root.rglob("*.safetensors"))


@pytest.mark.parametrize("fails", [False, True])
def test_no_descriptor_remains_open(jobs, fails):
    borrower = next(job for job in jobs if job.task.borrowed)

    def tick(_count):
        if fails:
            raise RunCancelledError("stop")

    before = open_descriptors()
    with pytest.raises(RunCancelledError) if fails else nullcontext():
        run_task(borrower, UnitPool(1), tick)
    assert open_descriptors() == before


def test_a_new_entry_need_not_be_hashed_when_it_is_loaded(jobs, settled):
    record = converted(jobs[0])
    with jobs[0].store.entry_path(record.key).open("rb") as file:
        assert jobs[0].store.digest_cache.lookup(file.fileno()) == record.digest


def test_an_entry_without_a_digest_is_converted_again(jobs, monkeypatch):
    record = converted(jobs[0])
    monkeypatch.setattr(Store, "entry_digest", lambda *_: None)
    monkeypatch.setattr(task_runner, "confirmed_defect", lambda *_: None)
    outcome = run_task(jobs[0], UnitPool(1), ignore)
    assert (outcome.record, outcome.converted) == (record, True)


def flat_digest(job: Job, record: EntryRecord) -> str:
    """Leave the entry as an earlier version did, with one digest over all bytes."""
    path = job.store.entry_path(record.key)
    digest = xxhash.xxh3_128(path.read_bytes()).hexdigest()
    path.with_suffix(".digest").write_text(f"xxh3-128 {digest} {record.size}\n")
    return digest


def test_an_entry_of_an_earlier_version_is_adopted_under_a_tree_digest(jobs):
    record = converted(jobs[0])
    flat_digest(jobs[0], record)
    outcome = run_task(jobs[0], UnitPool(1), ignore)
    assert (outcome.record, outcome.converted) == (record, False)
    assert record.digest == jobs[0].store.entry_digest(record.key)
    assert record.digest == digest_of(jobs[0].store.entry_path(record.key))


@pytest.mark.parametrize("at", [0, -1])
def test_a_damaged_entry_of_an_earlier_version_is_not_adopted(jobs, at):
    record = converted(jobs[0])
    path = jobs[0].store.entry_path(record.key)
    right = path.read_bytes()
    flat_digest(jobs[0], record)
    flip(path, at % len(right))
    outcome = run_task(jobs[0], UnitPool(1), ignore)
    assert (outcome.record, outcome.converted) == (record, True)
    assert path.read_bytes() == right


def test_a_record_of_an_earlier_version_is_used_as_it_is(jobs, monkeypatch):
    record = converted(jobs[0])
    old = replace(record, digest=flat_digest(jobs[0], record))
    monkeypatch.setattr(task_runner, "confirmed_defect", lambda *_: pytest.fail("read"))
    outcome = run_task(replace(jobs[0], known=old), UnitPool(1), ignore)
    assert (outcome.record, outcome.converted) == (old, False)


def test_a_tree_digest_that_cannot_be_written_is_no_error(jobs, monkeypatch):
    record, real = converted(jobs[0]), Store._publish
    flat_digest(jobs[0], record)

    def full(self, folder, name, data):
        if name.endswith(".digest"):
            raise StoreError("No space left on device")
        real(self, folder, name, data)

    monkeypatch.setattr(Store, "_publish", full)
    assert run_task(jobs[0], UnitPool(1), ignore).record == record


def test_an_adoption_checks_the_reading_that_gives_the_digest(jobs, monkeypatch):
    """Damage between the check and the new digest must not become the truth."""
    record = converted(jobs[0])
    flat_digest(jobs[0], record)
    path = jobs[0].store.entry_path(record.key)
    real = task_runner.confirmed_defect

    def then_damage(*given):
        found = real(*given)
        flip(path, record.size - 1)
        return found

    monkeypatch.setattr(task_runner, "confirmed_defect", then_damage)
    outcome = run_task(jobs[0], UnitPool(1), ignore)
    assert outcome.converted
    assert digest_of(path) == record.digest


@pytest.fixture
def lone(tmp_path, monkeypatch) -> Job:
    """One shard of many small units."""
    make_small(monkeypatch)
    return jobs_of(write_checkpoint(tmp_path / "one"), tmp_path / "cache")[0]


def test_one_unit_and_many_give_the_same_entry(lone):
    one = run_task(replace(lone, split=False), UnitPool(1), ignore).record
    data = lone.store.entry_path(one.key).read_bytes()
    for threads in (1, 3):
        lone.store.entry_path(one.key).unlink()
        with pool_of(threads) as pool:
            assert run_task(replace(lone, force=True), pool, ignore).record == one
        assert lone.store.entry_path(one.key).read_bytes() == data


def test_a_full_disk_in_one_unit_stores_nothing(lone, monkeypatch):
    """In each unit in turn."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    pool = Ordered(range, lambda *_: None)
    run_task(lone, pool, ignore)
    assert pool.ran > 20
    for path in [*lone.store.folder("entries").rglob("*.*")]:
        path.unlink()
    for unit in range(1, pool.ran, 5):  # 0 is the hash
        with monkeypatch.context() as patch:

            def before(ran, _unit, patch=patch, unit=unit):
                if ran == unit:
                    patch.setattr(os, "pwrite", full)

            with pytest.raises(StoreError, match="No space left on device"):
                run_task(replace(lone, force=True), Ordered(range, before), ignore)
        assert not list(lone.store.folder("entries").rglob("*.*"))
        assert not list(lone.store.folder("tmp").iterdir())


@pytest.mark.parametrize("change", ["lost", "twice"])
def test_a_piece_that_is_lost_or_written_twice_stores_nothing(lone, change):
    class Wrong(UnitPool):
        def run(self, units, tick):
            again = units[-1:] if change == "twice" else []
            yield from super().run([*units[: len(units) - (change == "lost")], *again], tick)

    with pytest.raises(AssertionError):
        run_task(lone, Wrong(1), ignore)
    assert not list(lone.store.folder("entries").rglob("*.*"))
    assert not list(lone.store.folder("tmp").iterdir())


def test_a_shard_that_was_hashed_is_not_hashed_again(jobs, monkeypatch):
    monkeypatch.setattr(SourceShard, "may_be_known", lambda *_: True)
    hashes, real = [], UnitPool.hash
    monkeypatch.setattr(UnitPool, "hash", lambda *a: hashes.append("first") or real(*a))
    pool = Ordered(range, lambda _ran, unit: hashes.append(unit.hashed is not None))
    assert run_task(jobs[0], pool, ignore).converted
    assert hashes == ["first", False]


def test_six_shards_in_units_are_those_of_one_unit_each(tmp_path, monkeypatch):
    make_small(monkeypatch)
    model = write_checkpoint(tmp_path / "six", cut=cut_apart(6))
    found = [
        [run_task(job, UnitPool(1), ignore).record for job in jobs_of(model, cache, split=split)]
        for cache, split in ((tmp_path / "a", False), (tmp_path / "b", True))
    ]
    assert found[0] == found[1]
