"""The cache of digests: which times and which clocks prove that a file has not changed."""

from __future__ import annotations

import os
import stat
import time

import pytest

from paroquant_stream.files import descriptor, digest_cache
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import DigestCache
from paroquant_stream.files.filesystems import Ctime
from tests.helpers.builders import uncovered
from tests.helpers.stamped_disk import (
    DATA,
    DAY,
    HOUR,
    SECOND,
    YEAR,
    hash_now,
    look_up,
    rewrite,
    sha256,
)


@pytest.mark.usefixtures("old")
def test_a_change_outside_the_sample_shows_in_the_ctime(cache, path, disk):
    digest, at = hash_now(cache, path), uncovered(path)
    rewrite(path, at)
    assert look_up(cache, path) is None
    assert hash_now(cache, path) == sha256(path) != digest


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("kind", [Ctime.UNKNOWN, Ctime.NONE])
def test_without_a_ctime_no_digest_is_stored_or_used(cache, path, disk, kind):
    disk.kind, disk.mirrors = kind, True
    digest, before = hash_now(cache, path), FileStamp.of(path.stat())
    assert list(cache.directory.iterdir()) == []
    disk.kind = Ctime.LOCAL
    hash_now(cache, path)
    assert look_up(cache, path) == digest
    disk.kind = kind
    rewrite(path, uncovered(path))
    assert FileStamp.of(path.stat()) == before  # so that nothing shows the change
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("old")
def test_on_an_unknown_file_system_a_later_ctime_counts(cache, path, disk):
    disk.kind = Ctime.UNKNOWN
    os.utime(path, ns=(YEAR, YEAR))
    digest = hash_now(cache, path)
    assert look_up(cache, path) == digest
    rewrite(path, uncovered(path))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "young")
@pytest.mark.parametrize("years", [10, -1])
def test_a_wrong_clock_of_the_process_settles_nothing(cache, path, monkeypatch, years):
    now = time.time_ns() + years * YEAR
    monkeypatch.setattr(time, "time_ns", lambda: now)
    assert hash_now(cache, path) == sha256(path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk")
def test_a_clock_that_is_behind_costs_only_reading(cache, path, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(descriptor, "RACY_SECONDS", -1)
        patch.setattr(descriptor, "TICK_SECONDS", -1)
        digest = hash_now(cache, path)
    now = time.time_ns() - YEAR
    monkeypatch.setattr(time, "time_ns", lambda: now)
    assert look_up(cache, path) == digest
    (tmp_path / "other").mkdir()
    other = DigestCache(tmp_path / "other")
    hash_now(other, path)
    assert look_up(other, path) is None


@pytest.mark.parametrize("tick", [SECOND, 2 * SECOND])
@pytest.mark.parametrize("ahead", [0, 10 * YEAR])
def test_two_contents_in_one_tick_are_never_confused(cache, path, disk, monkeypatch, tick, ahead):
    disk.kind, disk.tick = Ctime.WEAK, tick
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + ahead)
    at, hits, same = uncovered(path), 0, 0
    for _ in range(20):
        path.write_bytes(DATA)
        before = FileStamp.of(path.stat())
        hash_now(cache, path)
        hash_now(cache, path)
        rewrite(path, at)
        same += FileStamp.of(path.stat()) == before
        hits += look_up(cache, path) is not None
    assert same  # else no two contents were in one tick
    assert hits == 0


@pytest.mark.usefixtures("disk")
def test_the_time_of_the_start_of_the_hash_counts(cache, path, disk, monkeypatch):
    """A change during a hash can be in the last tick of the file, however long the hash takes."""
    monkeypatch.setattr(descriptor, "RACY_SECONDS", HOUR)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", HOUR)
    with path.open("rb") as file:
        before = cache.begin(file.fileno())
        later = time.time_ns() + 2 * HOUR * SECOND
        monkeypatch.setattr(time, "time_ns", lambda: later)
        disk.others.behind = -2 * HOUR * SECOND
        cache.remember(file.fileno(), before, "a" * 64)
        assert cache.lookup(file.fileno()) is None
        cache.remember(file.fileno(), cache.begin(file.fileno()), "a" * 64)
        assert cache.lookup(file.fileno()) == "a" * 64


@pytest.mark.parametrize("kind", [Ctime.WEAK, Ctime.UNKNOWN])
def test_by_another_clock_a_file_is_young_for_a_day(cache, path, disk, kind):
    disk.kind = kind
    os.utime(path, ns=(YEAR, YEAR))
    disk.behind = DAY - HOUR * SECOND
    digest = hash_now(cache, path)
    assert look_up(cache, path) is None
    disk.behind = DAY + HOUR * SECOND
    hash_now(cache, path)
    assert look_up(cache, path) == digest


def test_a_cache_on_another_machine_has_another_clock(cache, path, disk, monkeypatch):
    """The file is on this machine and the directory of the cache on another."""
    real = digest_cache.ctime_kind
    monkeypatch.setattr(
        digest_cache, "ctime_kind",
        lambda fd, *a: Ctime.WEAK if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd, *a),
    )  # fmt: skip
    disk.behind = DAY - HOUR * SECOND
    hash_now(cache, path)
    assert look_up(cache, path) is None


def test_a_cache_with_a_clock_ahead_settles_nothing(cache, path, disk):
    disk.kind, disk.others.behind = Ctime.WEAK, -10 * YEAR
    hash_now(cache, path)
    assert look_up(cache, path) is None


def test_by_another_clock_a_second_hash_settles_a_file(cache, path, disk, monkeypatch):
    disk.kind = Ctime.WEAK
    monkeypatch.setattr(descriptor, "RACY_SECONDS", HOUR)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", HOUR)
    digest = hash_now(cache, path)
    hash_now(cache, path)  # the first record is as young as the file
    assert look_up(cache, path) is None
    monkeypatch.setattr(descriptor, "RACY_SECONDS", 0.02)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", 0.02)
    time.sleep(0.05)
    hash_now(cache, path)
    assert look_up(cache, path) == digest


def test_two_digests_under_one_stamp_settle_nothing(cache, path, disk, monkeypatch):
    """The stamp did not show the change between them."""
    disk.kind = Ctime.WEAK
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", -1)
    with path.open("rb") as file:
        cache.remember(file.fileno(), cache.begin(file.fileno()), "a" * 64)
    hash_now(cache, path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk")
def test_another_hash_keeps_a_trusted_record(cache, path, monkeypatch):
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", -1)
    digest = hash_now(cache, path)
    monkeypatch.setattr(descriptor, "RACY_SECONDS", HOUR)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", HOUR)
    hash_now(cache, path)
    assert look_up(cache, path) == digest


@pytest.mark.usefixtures("disk", "old")
def test_a_clock_that_cannot_be_read_settles_nothing(cache, path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        hash_now(cache, path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk")
def test_a_file_that_was_left_alone_for_a_moment_is_settled(cache, path):
    os.utime(path)
    time.sleep(1.5 * descriptor.TICK_SECONDS)
    digest = hash_now(cache, path)
    assert look_up(cache, path) == digest


def test_by_another_clock_a_moment_is_not_enough(cache, path, disk):
    disk.kind = Ctime.WEAK
    os.utime(path)
    time.sleep(1.5 * descriptor.TICK_SECONDS)
    hash_now(cache, path)
    assert look_up(cache, path) is None
