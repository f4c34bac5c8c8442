"""Tests of damaged entries: detection, and what happens to them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from paroquant_stream.errors import EntryDamagedError
from paroquant_stream.store.damage import (
    confirmed_defect,
    damaged_path,
    defect_of,
    is_only_copy,
    keep_damaged,
    take_out,
)
from paroquant_stream.store.drop_record import write_record
from tests.helpers.records import (
    drop_record,
    entry_record,
    flip_last_byte,
    publish_entry,
)
from tests.helpers.stores import KEY, publish


def test_each_damaged_only_copy_is_kept(store):
    for number in (1, 2):
        publish(store, b"bad")
        kept = keep_damaged(store, KEY)
        assert kept == store.folder("damaged") / f"{KEY}.{number}.safetensors"
        assert store.entry_size(KEY) is None
    assert store.sweep() == 0
    assert damaged_path(store, KEY) == kept
    assert kept.read_bytes() == b"bad"


def test_an_intact_entry_has_no_defect(store):
    record = publish_entry(store)
    assert confirmed_defect(record, store) is None
    fd = store.open_entry(KEY)
    assert defect_of(record, store, fd) is None
    os.close(fd)


def test_a_flipped_bit_is_a_defect(store):
    record = publish_entry(store)
    flip_last_byte(store.entry_path(KEY))
    assert confirmed_defect(record, store).startswith(f"expected XXH3 {record.digest}, found ")


def test_another_layout_is_a_defect_whatever_the_digest(store):
    record = publish_entry(store)
    os.truncate(store.entry_path(KEY), record.size - 1)
    assert "XXH3" not in confirmed_defect(record, store)


def test_an_absent_entry_is_a_defect(store):
    assert "the entry cannot be opened" in confirmed_defect(entry_record(), store)


def test_a_defect_is_confirmed_from_the_disk(store, monkeypatch):
    record = publish_entry(store)
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: advice.append(a[1:]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    confirmed_defect(record, store)
    assert advice == [(0, 0, 4)]


def test_an_entry_with_sources_is_discarded(store, caplog):
    record = publish_entry(store)
    error = take_out(store, record, "the problem")
    assert isinstance(error, EntryDamagedError)
    assert str(error) == f"{store.entry_path(KEY)}: the problem; taken out of use"
    assert str(error) in caplog.text
    assert store.entry_size(KEY) is None
    assert damaged_path(store, KEY) is None


def test_an_only_copy_is_kept_and_its_source_named(store):
    record = publish_entry(store)
    write_record(store, drop_record(replace(record, dropped=True)))
    error = str(take_out(store, record, "the problem"))
    kept = damaged_path(store, KEY)
    assert kept.stat().st_size == record.size
    for words in (f"kept as {kept}", record.shard, record.source_sha256, "convert the model again"):
        assert words in error
    assert store.entry_size(KEY) is None


def test_an_only_copy_that_cannot_be_moved_is_left_in_place(store):
    record = publish_entry(store)
    write_record(store, drop_record(replace(record, dropped=True)))
    store.folder("damaged").touch()  # a file where the directory should be
    error = str(take_out(store, record, "the problem"))
    assert "left in place, as it cannot be moved, since --drop-source" in error
    assert store.entry_size(KEY) == record.size


def test_kept_copies_are_counted_as_numbers(store):
    for number in (2, 9, 10, 1000):
        (store.root / "v1" / "damaged").mkdir(exist_ok=True)
        (store.folder("damaged") / f"{KEY}.{number}.safetensors").touch()
        publish(store, b"bad")
        kept = store.folder("damaged") / f"{KEY}.{number + 1}.safetensors"
        assert keep_damaged(store, KEY) == kept
        assert damaged_path(store, KEY) == kept


def test_a_read_only_store_leaves_a_damaged_entry(store):
    record = publish_entry(store)
    error = take_out(replace(store, read_only=True), record, "the problem")
    assert "left in place, since the store is opened read-only" in str(error)
    assert store.entry_size(KEY) == record.size


BORROWED = ("b" * 64,)


@pytest.mark.parametrize(
    ("own", "other", "only"),
    [
        ({}, {}, False),
        ({"dropped": True}, {}, True),
        ({}, {"dropped": True}, False),
        ({"borrowed_sha256": BORROWED}, {"dropped": True}, True),
        ({"borrowed_sha256": BORROWED}, {}, False),
        ({"key": "d" * 64, "dropped": True}, {}, False),
    ],
)
def test_a_dropped_shard_makes_entries_only_copies(store, own, other, only):
    records = entry_record(**own), entry_record(key="c" * 64, **other)
    write_record(store, drop_record(*records))
    assert is_only_copy(store, KEY) is only


def test_an_unreadable_record_makes_entries_only_copies(store):
    assert not is_only_copy(store, KEY)
    write_record(store, drop_record())
    assert not is_only_copy(store, KEY)
    for path in store.folder("dropped").iterdir():
        flip_last_byte(path)
    assert is_only_copy(store, KEY)


def test_a_newer_record_makes_entries_only_copies(store):
    write_record(store, drop_record())
    for path in store.folder("dropped").iterdir():
        data = bytearray(path.read_bytes())
        data[10] += 1  # the major version
        path.write_bytes(data)
    assert is_only_copy(store, KEY)


def test_keeping_an_absent_entry_returns_none(store):
    assert keep_damaged(store, KEY) is None


def test_a_kept_entry_is_durable(store, monkeypatch):
    publish(store, b"bad")
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1])
    keep_damaged(store, KEY)
    assert store.folder("damaged").stat().st_ino in synced
