"""The memo of digests: it saves reading, and is never believed for a file that may have changed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass, replace

import pytest

from paroquant_stream.files import descriptor, digest_cache
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import DigestCache, hash_file
from paroquant_stream.files.filesystems import Ctime
from paroquant_stream.files.hashing import SourceHasher
from tests.helpers.builders import flip, uncovered

DATA = bytes(range(256)) * 1000
SECOND, DAY, YEAR = 10**9, 86_400 * 10**9, 365 * 86_400 * 10**9
HOUR = 3600  # s: so long a file counts as young in these tests, unless they say otherwise


@dataclass
class Disk:
    """The rules by which the file system of a test stamps its files."""

    kind: Ctime = Ctime.LOCAL
    mirrors: bool = False
    """ctime shows the mtime."""
    tick: int = 1
    """ns between two times that it can tell apart."""
    behind: int = 0
    """ns by which its clock is behind."""
    others: Disk | None = None
    """Those of all other files."""

    def stamp(self, status: os.stat_result) -> FileStamp:
        mtime, ctime = status.st_mtime_ns, status.st_ctime_ns
        times = [t - self.behind for t in (mtime, mtime if self.mirrors else ctime)]
        times = [t - t % self.tick for t in times]
        return FileStamp(status.st_dev, status.st_ino, status.st_size, *times)


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Disk:
    """That of the file `x`; the memo's is an ext4 whatever the machine has."""
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
    """Files count as left alone at once."""
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    monkeypatch.setattr(descriptor, "WIDE_SECONDS", -1)


@pytest.fixture
def young(monkeypatch):
    """What was written in the last hour counts as young."""
    monkeypatch.setattr(descriptor, "RACY_SECONDS", HOUR)


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_now(cache, path, name=None) -> str:
    with path.open("rb") as file:
        return hash_file(file.fileno(), "x", cache, name)


def look_up(cache, path, name=None) -> str | None:
    with path.open("rb") as file:
        return cache.lookup(file.fileno(), name)


def rewrite(path, at: int, keep_times: bool = True) -> None:
    """Changes one byte in place, the mtime restored."""
    before = path.stat()
    flip(path, at)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.usefixtures("disk", "old")
def test_a_file_that_was_left_alone_is_remembered(cache, path):
    assert look_up(cache, path) is None
    assert hash_now(cache, path) == sha256(path)
    assert look_up(cache, path) == sha256(path)
    assert cache.knows_size(len(DATA))
    assert not cache.knows_size(len(DATA) + 1)


@pytest.mark.usefixtures("disk", "young")
def test_a_young_file_is_not_remembered(cache, path):
    hash_now(cache, path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("field", ["device", "inode", "size", "mtime_ns", "ctime_ns", "fsid"])
def test_whatever_the_system_shows_of_the_file_must_be_as_it_was(cache, path, monkeypatch, field):
    hash_now(cache, path)
    (file,) = cache.directory.iterdir()
    form, identity, *rest = json.loads(file.read_bytes())
    index = ["device", "inode", "size", "mtime_ns", "ctime_ns", "fsid"].index(field)
    identity[index] += 1
    file.write_text(json.dumps([form, identity, *rest]))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("size", [0, 1, 5000, 60_000])
def test_every_byte_of_the_sample_counts(cache, path, monkeypatch, size):
    """With all times as they were: as when an image takes the place of another."""
    path.write_bytes(DATA[:size])
    stamp = FileStamp.of(path.stat())
    monkeypatch.setattr(FileStamp, "of", classmethod(lambda *_: stamp))
    hash_now(cache, path)
    assert look_up(cache, path)
    places = {size // 7 * i for i in range(7)} | {size - 1} if size else set()
    for at in places:
        flip(path, at)
        assert look_up(cache, path) is None, at
        flip(path, at)
        assert look_up(cache, path)


@pytest.mark.usefixtures("old")
def test_a_byte_outside_of_the_sample_is_noticed_by_the_ctime(cache, path, disk):
    digest, at = hash_now(cache, path), uncovered(path)
    rewrite(path, at)
    assert look_up(cache, path) is None
    assert hash_now(cache, path) == sha256(path) != digest


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("kind", [Ctime.UNKNOWN, Ctime.NONE])
def test_without_a_ctime_nothing_is_remembered_or_believed(cache, path, disk, kind):
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
def test_where_the_type_says_nothing_a_later_ctime_does(cache, path, disk):
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
def test_two_contents_in_one_tick_are_never_taken_for_each_other(
    cache, path, disk, monkeypatch, tick, ahead
):
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
    assert same > 10  # else nothing was tried
    assert hits == 0


@pytest.mark.usefixtures("disk")
def test_the_time_that_counts_is_that_of_the_start(cache, path, monkeypatch):
    """A change while the file is hashed may be in its last tick, however long the hash takes."""
    monkeypatch.setattr(descriptor, "RACY_SECONDS", 0.5)
    with path.open("rb") as file:
        before = cache.begin(file.fileno())
        time.sleep(0.6)
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


def test_a_memo_on_another_machine_has_another_clock(cache, path, disk, monkeypatch):
    """The file lies on this machine, and not so the memo's directory."""
    real = digest_cache.ctime_kind
    monkeypatch.setattr(
        digest_cache, "ctime_kind",
        lambda fd, *a: Ctime.WEAK if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd, *a),
    )  # fmt: skip
    disk.behind = DAY - HOUR * SECOND
    hash_now(cache, path)
    assert look_up(cache, path) is None


def test_a_memo_by_a_clock_that_is_ahead_settles_nothing(cache, path, disk):
    disk.kind, disk.others.behind = Ctime.WEAK, -10 * YEAR
    hash_now(cache, path)
    assert look_up(cache, path) is None


def test_by_another_clock_a_second_hash_settles_a_file(cache, path, disk, monkeypatch):
    disk.kind = Ctime.WEAK
    monkeypatch.setattr(descriptor, "RACY_SECONDS", 0.3)
    digest = hash_now(cache, path)
    hash_now(cache, path)  # at once: its first cache is young, too
    assert look_up(cache, path) is None
    time.sleep(0.4)
    hash_now(cache, path)
    assert look_up(cache, path) == digest


def test_what_had_another_digest_before_was_not_seen_long_enough(cache, path, disk, monkeypatch):
    """Two digests under one stamp: so the stamp did not show the change."""
    disk.kind = Ctime.WEAK
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    with path.open("rb") as file:
        cache.remember(file.fileno(), cache.begin(file.fileno()), "a" * 64)
    hash_now(cache, path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk")
def test_a_hash_of_what_is_known_takes_nothing_back(cache, path, monkeypatch):
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    digest = hash_now(cache, path)
    monkeypatch.setattr(descriptor, "RACY_SECONDS", HOUR)
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


@pytest.mark.usefixtures("young")
def test_a_name_counts_for_a_file_that_was_hashed(cache, path, disk):
    name = sha256(path)
    assert look_up(cache, path, name) is None  # a name alone is no identity
    hash_now(cache, path, name)
    assert look_up(cache, path) is None
    assert look_up(cache, path, "a" * 64) is None
    assert look_up(cache, path, name) == name
    rewrite(path, uncovered(path))
    assert look_up(cache, path, name) is None


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("kind", [Ctime.UNKNOWN, Ctime.NONE])
def test_a_name_counts_where_times_do_not(cache, path, disk, kind):
    disk.kind, disk.mirrors = kind, True
    name = sha256(path)
    hash_now(cache, path, "a" * 64)
    assert list(cache.directory.iterdir()) == []
    hash_now(cache, path, name)
    assert look_up(cache, path) is None
    assert look_up(cache, path, name) == name
    disk.kind = Ctime.LOCAL  # and what was kept for its name counts no more than that
    assert look_up(cache, path) is None
    disk.kind = kind
    rewrite(path, 0)  # in the sample
    assert look_up(cache, path, name) is None
    rewrite(path, 0)
    assert look_up(cache, path, name) == name
    rewrite(path, uncovered(path), keep_times=False)
    assert look_up(cache, path, name) is None


@pytest.mark.usefixtures("disk", "old")
def test_a_file_that_changed_meanwhile_is_not_remembered(cache, path):
    with path.open("rb") as file:
        before = cache.begin(file.fileno())
        rewrite(path, uncovered(path))
        cache.remember(file.fileno(), before, "a" * 64)
        assert cache.lookup(file.fileno()) is None
    assert list(cache.directory.iterdir()) == []


@pytest.mark.usefixtures("disk", "old")
def test_a_hash_looks_at_the_file_before_it_begins(cache, path, monkeypatch):
    real = SourceHasher.finish

    def finish(self):
        digest = real(self)
        rewrite(path, uncovered(path))
        return digest

    monkeypatch.setattr(SourceHasher, "finish", finish)
    assert hash_now(cache, path) != sha256(path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("young")
def test_what_its_writer_remembers_counts_at_once(cache, path, disk):
    with path.open("rb") as file:
        cache.remember_written(file.fileno(), FileStamp.of(path.stat()), "a" * 32)
    assert look_up(cache, path) == "a" * 32
    rewrite(path, uncovered(path))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ("changed since", {}),
        ("", {"kind": Ctime.WEAK, "tick": SECOND}),
        ("", {"kind": Ctime.UNKNOWN, "mirrors": True}),
        ("", {"kind": Ctime.NONE}),
    ],
)
def test_a_writer_remembers_nothing_that_may_change_unseen(cache, path, disk, change, rules):
    vars(disk).update(rules)
    stamp = FileStamp.of(path.stat())
    if change:
        rewrite(path, uncovered(path))
    with path.open("rb") as file:
        cache.remember_written(file.fileno(), stamp, "a" * 32)
    assert list(cache.directory.iterdir()) == []


DAMAGE = [b"", b"{", b"[]", b'[1,"x"]', b"null", b"\xff", b'[[1],"a"]', b'[2,[],"a",true]', b"7"]


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_memo_is_a_miss(cache, path, damage):
    hash_now(cache, path)
    next(cache.directory.iterdir()).write_bytes(damage)
    assert look_up(cache, path) is None
    hash_now(cache, path)
    assert look_up(cache, path) == sha256(path)


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize(("index", "value"), [(0, 3), (2, "a"), (2, 1), (3, 1), (3, "yes")])
def test_a_memo_of_another_form_is_a_miss(cache, path, index, value):
    hash_now(cache, path)
    (file,) = cache.directory.iterdir()
    found = json.loads(file.read_bytes())
    found[index] = value
    file.write_text(json.dumps(found))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
def test_a_memo_of_before_the_sample_is_a_miss(cache, path):
    status = path.stat()
    stamp = FileStamp.of(status)
    times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    before = [[status.st_dev, status.st_ino, *times], sha256(path)]
    cache.path(stamp).write_text(json.dumps(before))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
def test_a_memo_is_private_and_published_whole(cache, path, monkeypatch):
    real, seen = os.replace, []

    def look(temp, target, **where):
        seen.append(json.loads((cache.directory / temp).read_text()))
        real(temp, target, **where)

    monkeypatch.setattr(os, "replace", look)
    hash_now(cache, path)
    (file,) = cache.directory.iterdir()
    assert seen == [json.loads(file.read_text())]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.name == f"{len(DATA)}-{path.stat().st_dev:x}-{path.stat().st_ino:x}"


@pytest.mark.usefixtures("disk", "old")
def test_a_memo_that_cannot_be_written_is_no_error(path, tmp_path, cache, monkeypatch):
    hash_now(DigestCache(tmp_path / "absent" / "memo"), path)
    hash_now(DigestCache(tmp_path / "memo", read_only=True), path)
    with path.open("rb") as file:
        stamp = FileStamp.of(path.stat())
        DigestCache(tmp_path / "memo", read_only=True).remember_written(
            file.fileno(), stamp, "a" * 32
        )
    assert list(cache.directory.iterdir()) == []
    assert not (tmp_path / "absent").exists()


@pytest.mark.usefixtures("disk", "old")
def test_a_memo_that_is_only_read_leaves_its_directory_alone(path, tmp_path, cache):
    before = cache.directory.stat()
    hash_now(replace(cache, read_only=True), path)
    assert FileStamp.of(cache.directory.stat()) == FileStamp.of(before)
    hash_now(DigestCache(tmp_path / "other", read_only=True), path)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("disk", "old")
def test_a_tree_without_a_place_for_memos_gets_one(path, tmp_path):
    cache = DigestCache(tmp_path / "cloned")
    hash_now(cache, path)
    assert look_up(cache, path) == sha256(path)
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("broken", ["preadv", "fstatvfs", "fstat"])
def test_a_file_that_the_system_does_not_show_is_a_miss(cache, path, monkeypatch, broken):
    hash_now(cache, path)
    calls = []

    def fail(*_):
        calls.append(1)
        raise OSError(5, "Input/output error")

    fd = os.open(path, os.O_RDONLY)
    before = cache.begin(fd)
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        assert cache.lookup(fd) is None
        assert cache.begin(fd) is None
        cache.remember(fd, before, "a" * 64)
        cache.remember_written(fd, before.stamp, "a" * 64)
    assert len(calls) == 4
    assert cache.lookup(fd) == sha256(path)
    os.close(fd)


def test_times_in_the_future_are_never_settled(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    future = time.time() + 10**6
    os.utime(tmp_path / "x", (future, future))
    stamp = FileStamp.of((tmp_path / "x").stat())
    assert not stamp.is_settled(time.time_ns(), same_clock=True)
    assert replace(stamp, mtime_ns=0, ctime_ns=0).is_settled(time.time_ns(), same_clock=False)


def test_restoring_the_mtime_does_not_hide_a_change(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    stamp = FileStamp.of(path.stat())
    time.sleep(0.01)
    rewrite(path, 0)
    assert FileStamp.of(path.stat()) != stamp
