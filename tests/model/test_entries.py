"""Reading entries: every damage is noticed, and nothing is hashed that is known."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import EntryDamagedError, StoreError
from paroquant_stream.model import entries
from paroquant_stream.model.entries import check_sizes, guard_reads, read_weights
from paroquant_stream.store import damage
from tests.helpers.builders import flip, remember


@pytest.fixture
def converted(model_dir):
    request = make_request(model_dir, jobs=1)
    return convert(request).manifest, request.store


def everything(_name: str) -> bool:
    return True


def find_defect(record, store, full: bool) -> str | None:
    """Check the entry by the private function, as loading a model each time would be slow."""
    fd = os.open(store.entry_path(record.key), os.O_RDONLY)
    try:
        return entries._find_defect(record, store, fd, full)
    finally:
        os.close(fd)


def test_every_tensor_of_the_manifest_is_read(converted):
    manifest, store = converted
    weights = read_weights(manifest, store, everything)
    assert {name: array.shape for name, array in weights.items()} == {
        tensor.name: tensor.shape for record in manifest.entries for tensor in record.tensors
    }


def test_an_entry_without_a_wanted_tensor_is_not_opened(converted):
    manifest, store = converted
    only = next(t.name for t in manifest.entries[0].tensors)
    for record in manifest.entries[1:]:
        store.entry_path(record.key).unlink()
    assert set(read_weights(manifest, store, only.__eq__)) == {only}


@pytest.mark.parametrize("position", [9, 20_000, -1])
def test_a_flipped_bit_is_noticed_and_the_entry_taken_out_of_use(converted, position):
    manifest, store = converted
    path = store.entry_path(manifest.entries[0].key)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(EntryDamagedError, match=manifest.entries[0].key):
        read_weights(manifest, store, everything)
    assert not path.exists()


def test_a_truncated_or_absent_entry_is_noticed(converted):
    manifest, store = converted
    path = store.entry_path(manifest.entries[0].key)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EntryDamagedError, match="bytes, found"):
        read_weights(manifest, store, everything)
    with pytest.raises(StoreError, match="cannot be opened"):
        read_weights(manifest, store, everything)


def test_an_entry_as_its_writer_left_it_is_not_hashed_again(converted, monkeypatch):
    manifest, store = converted
    monkeypatch.setattr(
        "paroquant_stream.store.damage.hash_entry", lambda *_: pytest.fail("hashed")
    )
    assert read_weights(manifest, store, everything)


@pytest.mark.usefixtures("settled")
def test_a_changed_header_is_noticed_despite_a_known_digest(converted):
    manifest, store = converted
    record = manifest.entries[0]
    path = store.entry_path(record.key)
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"U16"', 1))
    remember(store.digest_cache, path, record.digest)
    with pytest.raises(EntryDamagedError, match="the header is not the one that was written"):
        read_weights(manifest, store, everything)


@pytest.mark.usefixtures("settled")
def test_an_entry_without_a_known_digest_is_hashed_once(converted, monkeypatch):
    manifest, store = converted
    for memo in store.folder("memo").iterdir():
        memo.unlink()
    real, hashed = damage.hash_entry, []
    monkeypatch.setattr(damage, "hash_entry", lambda *a: hashed.append(1) or real(*a))
    for _ in range(3):
        assert find_defect(manifest.entries[0], store, full=False) is None
    assert len(hashed) == 1


@pytest.mark.usefixtures("settled")
def test_a_known_digest_must_be_the_one_of_the_record(converted):
    manifest, store = converted
    other = replace(manifest.entries[0], digest="0" * 32)
    assert f"expected XXH3 {other.digest}" in find_defect(other, store, full=False)


@pytest.mark.usefixtures("settled")
def test_an_entry_that_changes_while_hashed_is_hashed_again(converted, monkeypatch):
    manifest, store = converted
    path = store.entry_path(manifest.entries[0].key)
    real, hashed = damage.hash_entry, []

    def hash_then_change(*given):
        digest = real(*given)
        if not hashed:
            flip(path, path.stat().st_size - 1)
        hashed.append(digest)
        return digest

    monkeypatch.setattr(damage, "hash_entry", hash_then_change)
    assert find_defect(manifest.entries[0], store, full=True) is None
    assert "expected XXH3" in find_defect(manifest.entries[0], store, full=False)


@pytest.mark.parametrize(
    "stride",
    [307, pytest.param(101, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)],
)
def test_every_flipped_bit_of_an_entry_is_found(converted, stride):
    """Check each `stride`-th bit of the length, header and data, and fewer of the padding.

    Without a known digest the default check finds them too.
    """
    manifest, store = converted
    record = min(manifest.entries, key=lambda record: record.size)
    path = store.entry_path(record.key)
    good = path.read_bytes()
    text = 8 + good[8:].index(b"}}") + 2
    bits = [*range(text * 8), *range(text * 8, 16_384 * 8, 77), *range(16_384 * 8, len(good) * 8)]
    assert find_defect(record, store, full=True) is None
    fd = os.open(path, os.O_WRONLY)
    missed = []
    for bit in bits[::stride]:
        os.pwrite(fd, bytes([good[bit // 8] ^ 1 << bit % 8]), bit // 8)
        if (
            find_defect(record, store, full=True) is None
            or find_defect(record, store, full=False) is None
        ):
            missed.append(bit)
        os.pwrite(fd, good[bit // 8 : bit // 8 + 1], bit // 8)
    os.close(fd)
    assert missed == []
    assert find_defect(record, store, full=True) is None


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.long)])
def test_every_truncation_and_an_appended_byte_are_found(converted, stride):
    manifest, store = converted
    record = manifest.entries[0]
    path = store.entry_path(record.key)
    with path.open("ab") as file:
        file.write(b"\0")
    assert "bytes, found" in find_defect(record, store, full=False)
    for size in range(record.size - 1, -1, -stride):
        os.truncate(path, size)
        assert "bytes, found" in find_defect(record, store, full=False)


def test_one_wrong_read_is_repeated_and_the_entry_stays(converted, monkeypatch, caplog):
    manifest, store = converted
    real, reads = entries.defect_of, []
    monkeypatch.setattr(
        entries, "defect_of", lambda *a: reads.append(1) or (real(*a) or "wrong bytes")
    )
    assert read_weights(manifest, store, everything, full=True)
    assert len(reads) == len(manifest.entries)
    assert "the next one the right ones" in caplog.text
    assert all(store.entry_path(record.key).exists() for record in manifest.entries)


def test_an_error_of_a_check_closes_the_descriptor(converted, monkeypatch):
    manifest, store = converted
    opened, real = [], store.open_entry
    monkeypatch.setattr(
        type(store), "open_entry", lambda _, key: opened.append(real(key)) or opened[-1]
    )

    def fail(*_):
        raise StoreError("cannot be read")

    monkeypatch.setattr(entries, "layout_defect", fail)
    with pytest.raises(StoreError, match="cannot be read"):
        read_weights(manifest, store, everything)
    assert opened
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_guarded_error_of_this_package_is_not_wrapped(converted):
    manifest, store = converted
    with pytest.raises(StoreError, match="no space"), guard_reads(manifest.entries, store):
        raise StoreError("no space")


def test_a_removed_entry_that_is_still_open_is_no_truncated_one(converted):
    manifest, store = converted
    check_sizes(manifest.entries, store)
    path = store.entry_path(manifest.entries[0].key)
    path.unlink()
    check_sizes(manifest.entries, store)
    path.write_bytes(b"short")
    with pytest.raises(EntryDamagedError, match="became shorter while it was read"):
        check_sizes(manifest.entries, store)
    assert not path.exists()


@pytest.mark.usefixtures("settled")
def test_a_damaged_entry_does_not_enter_the_digest_cache(converted):
    manifest, store = converted
    record = manifest.entries[0]
    flip(store.entry_path(record.key), record.size - 1)
    for _ in range(2):
        assert "expected XXH3" in find_defect(record, store, full=False)


@pytest.mark.usefixtures("settled")
def test_after_a_failure_of_mlx_every_entry_is_hashed(converted):
    manifest, store = converted
    record = manifest.entries[0]
    path = store.entry_path(record.key)
    flip(path, record.size - 1)
    remember(store.digest_cache, path, record.digest)
    assert find_defect(record, store, full=False) is None
    with pytest.raises(EntryDamagedError, match="expected XXH3"), guard_reads([record], store):
        raise RuntimeError("cannot read")
