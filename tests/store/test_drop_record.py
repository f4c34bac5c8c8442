"""Tests of drop records: two copies and their repair."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from paroquant_stream.errors import ManifestError, NewerManifestError, StoreError
from paroquant_stream.store import drop_record as module
from paroquant_stream.store.drop_record import (
    DropRecord,
    is_stored,
    new_id,
    read_record,
    read_records,
    record_ids,
    repair_records,
    write_record,
)
from paroquant_stream.store.manifest import pack, seal, unpack, unseal
from paroquant_stream.store.store import Store
from tests.helpers.records import SHARD, drop_record, entry_record, flip_last_byte, header_bytes

ID = "1" * 64
RECORD = drop_record(entry_record(dropped=True), **{SHARD: header_bytes()})


def copies(store, drop_id: str = ID) -> list:
    return [store.folder("dropped") / f"{drop_id}.{name}.msgpack" for name in ("first", "second")]


def changed(**fields) -> bytes:
    """The bytes of a record with other fields, and a hash that is right."""
    body = unpack(unseal(module.MAGIC, RECORD.encode()), module.MAX_RECORD)
    return seal(module.MAGIC, pack(body | fields))


def test_a_record_is_decoded_as_it_was_encoded():
    data = RECORD.encode()
    assert DropRecord.decode(ID, data) == RECORD
    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1
        if 8 <= position < 10:  # the minor version
            continue
        with pytest.raises(ManifestError):
            DropRecord.decode(ID, bytes(flipped))
    with pytest.raises(ManifestError):
        DropRecord.decode(ID, data[:-1])


def test_a_newer_record_has_an_error_of_its_own():
    data = bytearray(RECORD.encode())
    data[10] += 1
    with pytest.raises(NewerManifestError):
        DropRecord.decode(ID, bytes(data))
    inner = bytearray(RECORD.manifest.encode())
    inner[10] += 1
    with pytest.raises(NewerManifestError):
        DropRecord.decode(ID, changed(manifest=bytes(inner)))


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float64"},
        {"dtype": ["source"]},
        {"manifest": b"x"},
        {"manifest": None},
        {"headers": {b"x": b"y"}},
        {"headers": {"x": "y"}},
        {"headers": []},
        {"headers": {"x": bytes((32 << 20) + 9)}},
    ],
)
def test_a_field_of_a_wrong_type_or_size_is_an_error(fields):
    with pytest.raises(ManifestError):
        DropRecord.decode(ID, changed(**fields))


def test_a_header_of_the_largest_size_is_accepted():
    headers = {"x": bytes((32 << 20) + 8)}
    assert DropRecord.decode(ID, changed(headers=headers)).headers == headers


def test_a_kept_header_is_parsed():
    assert [tensor.name for tensor in RECORD.header(SHARD).tensors] == ["x"]
    assert RECORD.header("other.safetensors") is None
    assert drop_record(entry_record()).header(SHARD) is None
    assert drop_record(**{SHARD: header_bytes()}).header(SHARD) is None


def test_new_ids_are_random():
    ids = {new_id() for _ in range(10)}
    assert len(ids) == 10
    assert all(len(drop_id) == 64 and int(drop_id, 16) for drop_id in ids)


def test_a_written_record_has_two_equal_copies(store):
    write_record(store, RECORD)
    assert [path.read_bytes() for path in copies(store)] == [RECORD.encode()] * 2
    assert read_record(store, ID) == RECORD
    assert is_stored(store, RECORD)


@pytest.mark.parametrize("harm", [flip_last_byte, os.unlink])
@pytest.mark.parametrize("lost", [0, 1])
def test_either_copy_is_enough_and_repairs_the_other(store, caplog, harm, lost):
    write_record(store, RECORD)
    harm(copies(store)[lost])
    assert record_ids(store) == [ID]
    assert read_records(store) == [RECORD]
    assert not is_stored(store, RECORD)
    repair_records(store)
    assert is_stored(store, RECORD)
    assert caplog.text.count("replaced the damaged") == 1
    repair_records(store)
    assert caplog.text.count("replaced the damaged") == 1


def test_the_copy_that_is_written_first_is_used(store):
    """A crash between the two leaves a newer first copy."""
    write_record(store, RECORD)
    newer = drop_record(entry_record(shard="other.safetensors", dropped=True))
    copies(store)[0].write_bytes(newer.encode())
    assert read_record(store, ID) == newer
    repair_records(store)
    assert copies(store)[1].read_bytes() == newer.encode()


def test_two_damaged_copies_are_listed_but_not_read(store):
    write_record(store, RECORD)
    other = drop_record(drop_id="2" * 64)
    write_record(store, other)
    for path in copies(store):
        flip_last_byte(path)
    before = [path.read_bytes() for path in copies(store)]
    assert sorted(record_ids(store)) == [ID, "2" * 64]
    assert read_record(store, ID) is None
    assert read_records(store) == [other]
    repair_records(store)
    assert [path.read_bytes() for path in copies(store)] == before


def test_a_newer_copy_is_an_error_and_not_replaced(store):
    write_record(store, RECORD)
    newer = bytearray(RECORD.encode())
    newer[10] += 1
    copies(store)[1].write_bytes(newer)
    for action in (read_records, repair_records):
        with pytest.raises(NewerManifestError):
            action(store)
    assert copies(store)[1].read_bytes() == newer


def test_other_files_among_the_records_are_ignored(store):
    for name in ("x.msgpack", f"{ID}.third.msgpack", f"{'g' * 64}.first.msgpack"):
        store.write_file("dropped", name, b"x")
    assert record_ids(store) == []


def test_a_record_that_could_not_be_read_is_not_written(store, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORD", len(RECORD.encode()))
    write_record(store, RECORD)
    assert is_stored(store, RECORD)
    monkeypatch.setattr(module, "MAX_RECORD", len(RECORD.encode()) - 1)
    with pytest.raises(StoreError, match=r"its record takes [0-9,]+ bytes, too many"):
        write_record(store, drop_record(drop_id="2" * 64, **{SHARD: header_bytes()}, y=b"y" * 999))
    assert record_ids(store) == [ID]


def test_records_in_a_model_directory_are_bounded(tmp_path, monkeypatch):
    shipped = Store(tmp_path / "mlx", private=False)
    for drop_id in (ID, "2" * 64):
        write_record(shipped, drop_record(entry_record(dropped=True), drop_id=drop_id))
    size = sum(path.stat().st_size for path in shipped.folder("dropped").iterdir())
    monkeypatch.setattr(module, "_MAX_SHIPPED", size)
    assert len(read_records(shipped)) == 2
    monkeypatch.setattr(module, "_MAX_SHIPPED", size - 1)
    with pytest.raises(ManifestError, match=rf"at most .* bytes of records, found {size:,}; .*rem"):
        read_records(shipped)
    assert len(read_records(replace(shipped, root=tmp_path / "mlx", private=True))) == 2
