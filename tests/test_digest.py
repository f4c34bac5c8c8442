"""Digests and the memo: right by reading, right by stat, and never by a stat that may lie."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace

import pytest
import xxhash

from paroquant_stream import digest
from paroquant_stream.digest import (
    FileStamp,
    Memo,
    SourceHasher,
    hash_entry,
    hash_file,
    read_chunks,
)
from paroquant_stream.errors import SourceChanged
from paroquant_stream.tensorfile import TensorInfo

DATA = bytes(range(256)) * 50_000  # 12.8 MB, over three chunks


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def memo(tmp_path) -> Memo:
    (tmp_path / "memo").mkdir()
    return Memo(tmp_path / "memo")


def stamp_of(path) -> FileStamp:
    return FileStamp.of(os.stat(path))


def test_chunks_are_the_bytes_in_order_in_the_buffer_that_is_given(fd):
    buffer = memoryview(bytearray(5_000_000))
    sizes, seen = [], bytearray()
    for chunk in read_chunks(fd, 3, len(DATA) - 2, "x", buffer):
        sizes.append(len(chunk))
        seen += chunk
    assert bytes(seen) == DATA[3:-2]
    assert sizes == [5_000_000, 5_000_000, len(DATA) - 5 - 10_000_000]


def test_short_reads_are_continued(fd, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, views, at: real(f, [views[0][:999_983]], at))
    assert hash_entry(fd, "x") == xxhash.xxh3_128_hexdigest(DATA)


def test_a_file_that_ends_early_is_an_error(fd):
    with pytest.raises(SourceChanged, match="shorter"):
        list(read_chunks(fd, 0, len(DATA) + 1, "x", memoryview(bytearray(100_000))))


FIRST = TensorInfo("a", "U8", (100,), 10, 110)
EMPTY = TensorInfo("e", "U8", (0,), 110, 110)
SECOND = TensorInfo("b", "U8", (len(DATA) - 500,), 400, len(DATA) - 100)
WANTED = {
    "a": xxhash.xxh3_128_digest(DATA[10:110]),
    "e": xxhash.xxh3_128_digest(b""),
    "b": xxhash.xxh3_128_digest(DATA[400:-100]),
}


def test_one_pass_gives_the_hash_of_the_file_and_of_each_tensor(fd):
    ticks: list[int] = []
    hasher = SourceHasher(fd, (FIRST, EMPTY, SECOND), len(DATA), "x", ticks.append)
    found = hasher.finish()
    assert found.sha256 == hashlib.sha256(DATA).hexdigest()
    assert found.fingerprints == WANTED
    assert sum(ticks) == len(DATA)


def test_bytes_that_were_read_for_another_end_are_not_read_again(fd, monkeypatch):
    hasher = SourceHasher(fd, (FIRST, EMPTY, SECOND), len(DATA), "x", lambda _: None)
    hasher.advance(50)
    hasher.update(memoryview(DATA[50:5000]))
    reads = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, v, at: reads.append(at) or real(f, v, at))
    hasher.advance(1000)  # is behind
    found = hasher.finish()
    assert min(reads) == 5000
    assert found.sha256 == hashlib.sha256(DATA).hexdigest()
    assert found.fingerprints == WANTED


def test_an_entry_is_hashed_whole(fd):
    assert hash_entry(fd, "x") == xxhash.xxh3_128_hexdigest(DATA)


def test_a_memo_gives_back_what_it_was_told_for_the_same_stamp_only(memo, tmp_path):
    stamp = stamp_of(tmp_path / "memo")
    memo.remember(stamp, "a" * 64)
    assert memo.lookup(stamp) == "a" * 64
    assert memo.lookup(replace(stamp, ctime_ns=stamp.ctime_ns + 1)) is None
    assert memo.lookup(replace(stamp, mtime_ns=stamp.mtime_ns + 1)) is None
    assert memo.lookup(replace(stamp, inode=stamp.inode + 1)) is None


def test_a_memo_knows_the_sizes_it_was_told(memo, tmp_path):
    stamp = stamp_of(tmp_path / "memo")
    memo.remember(stamp, "a" * 64)
    assert memo.knows_size(stamp.size)
    assert not memo.knows_size(stamp.size + 1)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'[1,"x"]', b"null", b"\xff", b'[[1],"a"]'])
def test_a_damaged_memo_is_a_miss(memo, tmp_path, damage):
    stamp = stamp_of(tmp_path / "memo")
    memo.remember(stamp, "a" * 64)
    next(memo.directory.iterdir()).write_bytes(damage)
    assert memo.lookup(stamp) is None


def test_a_memo_that_cannot_be_written_is_no_error(tmp_path):
    stamp = stamp_of(tmp_path)
    Memo(tmp_path / "absent").remember(stamp, "a" * 64)
    Memo(tmp_path, read_only=True).remember(stamp, "a" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_young_file_is_not_remembered(fd, memo, tmp_path):
    hash_file(fd, "x", memo)
    assert memo.lookup(stamp_of(tmp_path / "x")) is None


def test_an_old_file_is_remembered(fd, memo, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "RACY_SECONDS", -1)
    assert hash_file(fd, "x", memo) == hashlib.sha256(DATA).hexdigest()
    assert memo.lookup(stamp_of(tmp_path / "x")) == hashlib.sha256(DATA).hexdigest()


def test_times_in_the_future_are_never_settled(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    future = time.time() + 10**6
    os.utime(tmp_path / "x", (future, future))
    assert not stamp_of(tmp_path / "x").is_settled(time.time_ns())


def test_restoring_the_mtime_does_not_hide_a_change(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    before = path.stat()
    stamp = stamp_of(path)
    time.sleep(0.01)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stamp_of(path) != stamp
