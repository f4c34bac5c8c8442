"""The memo of digests: right by stat, and never by a stat that may lie."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace

import pytest

from paroquant_stream import descriptor
from paroquant_stream.descriptor import FileStamp
from paroquant_stream.digest_cache import Memo, hash_file

DATA = bytes(range(256)) * 50_000


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
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
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
