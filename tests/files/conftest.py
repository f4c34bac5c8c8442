"""Fixtures of the tests of digest caches."""

from __future__ import annotations

import os

import pytest

from paroquant_stream.files import descriptor, digest_cache
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import DigestCache
from paroquant_stream.files.filesystems import Ctime
from tests.helpers.stamped_disk import DATA, HOUR, Disk


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Disk:
    """The file system of `x`; that of the cache is like ext4 on every machine."""
    disk = Disk(others=Disk())

    def of(_, status):
        here = os.path.exists(path) and os.path.samestat(status, os.stat(path))
        return (disk if here else disk.others).stamp(status)

    def kind(fd, *_):
        return disk.kind if os.path.samestat(os.fstat(fd), os.stat(path)) else Ctime.LOCAL

    path = tmp_path / "x"
    monkeypatch.setattr(FileStamp, "of", classmethod(of))
    monkeypatch.setattr(digest_cache, "ctime_kind", kind)
    return disk


@pytest.fixture
def path(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    return tmp_path / "x"


@pytest.fixture
def cache(tmp_path) -> DigestCache:
    (tmp_path / "memo").mkdir()
    return DigestCache(tmp_path / "memo")


@pytest.fixture
def old(monkeypatch):
    """Every file counts as settled."""
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", -1)
    monkeypatch.setattr(descriptor, "WIDE_SECONDS", -1)


@pytest.fixture
def young(monkeypatch):
    """A file counts as settled an hour after it was written."""
    monkeypatch.setattr(descriptor, "RACY_SECONDS", HOUR)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", HOUR)
