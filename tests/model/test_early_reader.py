"""Entries are read while later shards are converted; what fails is read again, or repaired."""

from __future__ import annotations

import threading
import weakref
from contextlib import closing
from dataclasses import replace

import mlx.core as mx
import pytest

from paroquant_stream import load
from paroquant_stream.errors import EntryDamagedError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.model import early_reader, entries
from paroquant_stream.model.early_reader import EarlyReader
from paroquant_stream.store.manifest import EntryRecord
from tests.helpers.parameters import assert_same, parameters

LIMIT = 30  # seconds to wait for what happens at once; reached only by a failure
ONE = EntryRecord(
    *("a.safetensors", "0" * 64, 100, (), "1" * 64, "2" * 64, "3" * 32, 400),
    (TensorSpec("x", "F32", (2, 2)),),
)


def arrays(_record) -> dict[str, mx.array]:
    return {"x": mx.ones((2, 2))}


def test_an_entry_is_read_in_another_thread_and_given_away_once():
    threads = []

    def read(given):
        threads.append(threading.current_thread())
        return arrays(given)

    with closing(EarlyReader(read)) as early:
        early.add(ONE)
        found = early.take(ONE)
        assert found["x"].tolist() == [[1, 1], [1, 1]]
        assert early.take(ONE) is None
    assert threads[0] is not threading.main_thread()


def test_every_load_reads_in_the_same_threads(monkeypatch):
    """MLX starts a thread for each thread that evaluates, and never ends it."""
    monkeypatch.setattr(early_reader.os, "cpu_count", lambda: 1)
    names = []

    def read(given):
        names.append(threading.get_native_id())
        return arrays(given)

    for _ in range(3):
        with closing(EarlyReader(read)) as early:
            early.add(ONE)
            assert early.take(ONE)
    assert len(set(names)) == 1


def test_a_load_that_failed_reads_no_more_entries(monkeypatch):
    monkeypatch.setattr(early_reader.os, "cpu_count", lambda: 1)
    begun, go_on, read = threading.Event(), threading.Event(), []

    def wait(given):
        begun.set()
        go_on.wait(LIMIT)
        read.append(given)
        return {}

    with closing(EarlyReader(wait)) as early:
        early.add(ONE)
        early.add(replace(ONE, key="other"))
        begun.wait(LIMIT)
    go_on.set()
    with closing(EarlyReader(arrays)) as early:  # after all that was queued
        early.add(ONE)
        assert early.take(ONE)
    assert read == [ONE]


def test_an_entry_that_was_not_added_is_not_there():
    with closing(EarlyReader(arrays)) as early:
        assert early.take(ONE) is None


@pytest.mark.parametrize(
    ("device", "cores", "count"),
    [("cpu", None, 1), ("cpu", 1, 1), ("cpu", 7, 1), ("cpu", 8, 2), ("cpu", 16, 4), ("gpu", 16, 1)],
)
def test_a_thread_reads_for_four_cores_but_one_for_a_gpu(monkeypatch, device, cores, count):
    monkeypatch.setattr(early_reader.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(early_reader.mx, "default_device", lambda: getattr(early_reader.mx, device))
    together, main = threading.Barrier(count + 1), threading.Semaphore(0)
    names = set()

    def read(_record):
        names.add(threading.current_thread().name)
        together.wait(LIMIT)
        main.acquire(timeout=LIMIT)
        return {}

    records = [replace(ONE, key=str(number)) for number in range(count + 2)]
    with closing(EarlyReader(read)) as early:
        for record in records:
            early.add(record)
        together.wait(LIMIT)
        assert len(names) == count
        together.abort()  # the others go on by themselves
        main.release(len(records))


def test_without_more_threads_an_entry_is_read_later(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    read = []
    early_reader._threads.cache_clear()  # private: those of other tests have begun
    with closing(EarlyReader(read.append)) as early, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        early.add(ONE)
        assert early.take(ONE) is None
    with closing(EarlyReader(arrays)) as early:
        early.add(ONE)
        assert early.take(ONE)
    assert not read  # not by a later load either


def test_damage_is_raised_and_other_failures_are_read_again():
    errors = [EntryDamagedError("damaged"), RuntimeError("[load] failed")]

    def fail(_record):
        raise errors.pop(0)

    with closing(EarlyReader(fail)) as early:
        early.add(ONE)
        with pytest.raises(EntryDamagedError):
            early.take(ONE)
        early.add(ONE)
        assert early.take(ONE) is None


@pytest.mark.parametrize("is_linux", [True, False])
def test_without_memory_nothing_is_read_early(monkeypatch, is_linux):
    all_of_it = 2 * ONE.size
    monkeypatch.setattr(early_reader, "available_memory", lambda: all_of_it if is_linux else None)
    monkeypatch.setattr(early_reader, "physical_memory", lambda: all_of_it)
    with closing(EarlyReader(arrays)) as early:
        early.add(ONE)
        assert early.take(ONE) is None
        early.add(replace(ONE, size=ONE.size // 4))
        assert (early.take(ONE) is not None) is is_linux  # elsewhere all that was added counts


@pytest.mark.parametrize("is_linux", [True, False])
def test_without_memory_nothing_is_copied(monkeypatch, is_linux):
    tensors = lay_out(ONE.tensors)[1]
    free = 2 * tensors[-1].stop
    for size in (free, free + 1):
        monkeypatch.setattr(
            early_reader, "available_memory", lambda s=size: s if is_linux else None
        )
        monkeypatch.setattr(early_reader, "physical_memory", lambda s=size: s)
        with closing(EarlyReader(arrays)) as early:
            assert (early.begin(tensors) is None) is (size == free)
            if size > free:  # elsewhere all that was begun counts
                assert (early.begin(tensors) is None) is not is_linux


def put_all(copy) -> None:
    (tensor,) = lay_out(ONE.tensors)[1]
    copy.put(tensor.start, memoryview(bytes(tensor.nbytes)))


def test_what_was_copied_is_given_away_once_and_not_read():
    with closing(EarlyReader(pytest.fail)) as early:
        copy = early.begin(lay_out(ONE.tensors)[1])
        put_all(copy)
        assert early.take(ONE) is None  # not published yet
        early.add(ONE, copy)
        assert early.take(ONE)["x"].tolist() == [[0, 0], [0, 0]]
        assert early.take(ONE) is None


def test_what_was_copied_in_part_is_left_to_be_read():
    with closing(EarlyReader(pytest.fail)) as early:
        early.add(ONE, early.begin(lay_out(ONE.tensors)[1]))
        assert early.take(ONE) is None


def test_a_load_that_failed_gives_its_copies_up():
    with closing(EarlyReader(pytest.fail)) as early:
        copy = early.begin(lay_out(ONE.tensors)[1])
        put_all(copy)
        assert copy.take()
    assert copy.take() is None
    assert early.begin(lay_out(ONE.tensors)[1]) is None


def test_a_copy_without_memory_is_read_early():
    with closing(EarlyReader(arrays)) as early:
        copy = early.begin(lay_out(ONE.tensors)[1])
        copy.close()
        early.add(ONE, copy)
        assert early.take(ONE)["x"].tolist() == [[1, 1], [1, 1]]


def test_a_copy_that_was_taken_is_not_kept():
    with closing(EarlyReader(pytest.fail)) as early:
        copy = early.begin(lay_out(ONE.tensors)[1])
        put_all(copy)
        early.add(ONE, copy)
        early.take(ONE)
        watched = weakref.ref(copy)
        del copy
        assert watched() is None


def test_no_copy_is_begun_of_an_entry_without_tensors():
    with closing(EarlyReader(arrays)) as early:
        assert early.begin(()) is None


def test_a_copy_does_not_wait_for_entries_that_are_read(monkeypatch):
    monkeypatch.setattr(early_reader.os, "cpu_count", lambda: 1)
    copied = threading.Event()

    def wait(given):
        assert copied.wait(LIMIT)
        return arrays(given)

    with closing(EarlyReader(wait)) as early:
        early.add(replace(ONE, key="other"))
        put_all(early.begin(lay_out(ONE.tensors)[1]))
        copied.set()
        assert early.take(replace(ONE, key="other"))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_memory_of_a_gpu_is_not_written(monkeypatch, device):
    monkeypatch.setattr(early_reader.mx, "default_device", lambda: getattr(early_reader.mx, device))
    with closing(EarlyReader(arrays)) as early:
        assert (early.begin(lay_out(ONE.tensors)[1]) is None) is (device == "gpu")


@pytest.mark.parametrize(
    ("options", "expected"), [({"verify": "full"}, [None] * 3), ({"lazy": True}, [])]
)
def test_a_load_that_reads_itself_copies_nothing(model_dir, monkeypatch, options, expected):
    begun, real = [], EarlyReader.begin
    monkeypatch.setattr(EarlyReader, "begin", lambda *a: begun.append(real(*a)) or begun[-1])
    load(model_dir, **options)
    assert begun == expected


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_first_load_reads_nothing_back(model_dir, tmp_path, monkeypatch, jobs):
    read, real = [], entries.read_entry
    monkeypatch.setattr(entries, "read_entry", lambda *a, **k: read.append(1) or real(*a, **k))
    first, *_ = load(model_dir, cache_dir=tmp_path / "cache", jobs=jobs)
    assert not read
    second, *_ = load(model_dir, cache_dir=tmp_path / "cache")
    assert len(read) == 3
    assert_same(parameters(first), parameters(second))


def test_without_threads_for_copies_an_entry_is_read_later(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    early_reader._threads.cache_clear()  # private: those of other tests have begun
    with closing(EarlyReader(pytest.fail)) as early, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert early.begin(lay_out(ONE.tensors)[1]) is None
    early_reader._threads.cache_clear()  # what was queued there is not begun


def test_a_first_load_reads_every_entry_early(model_dir, monkeypatch):
    taken, real = [], EarlyReader.take

    def take(self, given):
        found = real(self, given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(EarlyReader, "take", take)
    load(model_dir)
    assert taken == [True] * 3


def test_a_failed_conversion_leaves_no_model(model_dir, monkeypatch):
    from paroquant_stream.store.store import Store

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_manifest", fail)
        with pytest.raises(OSError, match="No space"):
            load(model_dir)
