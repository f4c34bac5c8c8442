"""The cache of digests: never used for a file that may have changed."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import replace

import pytest

from paroquant_stream.files import digest_cache
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import DigestCache
from paroquant_stream.files.filesystems import Ctime
from paroquant_stream.files.hashing import SourceHasher
from tests.helpers.builders import flip, uncovered
from tests.helpers.stamped_disk import DATA, SECOND, hash_now, look_up, rewrite, sha256


@pytest.mark.usefixtures("disk", "old")
def test_the_digest_of_a_settled_file_is_stored(cache, path):
    assert look_up(cache, path) is None
    assert hash_now(cache, path) == sha256(path)
    assert look_up(cache, path) == sha256(path)
    assert cache.knows_size(len(DATA))
    assert not cache.knows_size(len(DATA) + 1)


def may_know(cache, path, data: bytes, digest: str | None = None) -> bool:
    """Ask of a file with some bytes."""
    other = path.with_name("other")
    other.write_bytes(data)
    with other.open("rb") as file:
        return cache.may_know(file.fileno(), digest)


@pytest.mark.usefixtures("disk", "old")
def test_a_file_with_the_size_and_sample_of_another_may_be_known(cache, path):
    assert not may_know(cache, path, DATA)  # there is no record at all
    hash_now(cache, path)
    assert may_know(cache, path, DATA)
    assert not may_know(cache, path, DATA[:-1])
    assert not may_know(cache, path, bytes([DATA[0] ^ 1]) + DATA[1:])


@pytest.mark.usefixtures("disk", "old")
def test_a_file_may_have_the_digest_whose_sample_was_lost(cache, path):
    """Also after others of the same size were hashed."""
    other = bytes([DATA[0] ^ 1]) + DATA[1:]
    assert may_know(cache, path, other, "a" * 64)
    hash_now(cache, path)
    assert may_know(cache, path, other, "a" * 64)
    assert not may_know(cache, path, other, sha256(path))  # which went with another sample


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("lost", ["directory", "state"])
def test_a_file_may_have_its_digest_where_nothing_can_be_compared(cache, path, monkeypatch, lost):
    """As once the directory of digests was removed, or on a file system that says nothing."""
    hash_now(cache, path)
    if lost == "directory":
        cache = replace(cache, directory=path.with_name("absent"), opener=None)
    else:
        monkeypatch.setattr(digest_cache, "_observe", lambda _: None)
    assert may_know(cache, path, DATA, sha256(path))
    assert not may_know(cache, path, DATA)


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize(
    "damage", [b"", b"[" * 4000, b"[2, null, null, true]", b'[2, "x", "' + b"a" * 64 + b'", true]']
)
def test_a_damaged_record_is_of_no_file(cache, path, damage):
    hash_now(cache, path)
    (record,) = cache.directory.iterdir()
    record.write_bytes(damage)
    assert not may_know(cache, path, DATA)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
def test_any_file_of_a_size_with_very_many_records_may_be_known(cache, path, monkeypatch):
    hash_now(cache, path)
    other = bytes([DATA[0] ^ 1]) + DATA[1:]
    for limit, expected in ((1, False), (0, True)):
        monkeypatch.setattr(digest_cache, "_MAX_EQUAL", limit)
        assert may_know(cache, path, other) is expected


@pytest.mark.usefixtures("disk", "young")
def test_the_digest_of_a_young_file_is_not_stored(cache, path):
    hash_now(cache, path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("field", ["device", "inode", "size", "mtime_ns", "ctime_ns", "fsid"])
def test_every_field_of_the_stamp_must_be_equal(cache, path, monkeypatch, field):
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
    """With equal times, as when one image replaces another."""
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


@pytest.mark.usefixtures("young")
def test_a_blob_name_counts_for_a_hashed_file(cache, path, disk):
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
def test_a_blob_name_counts_where_times_do_not(cache, path, disk, kind):
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
def test_a_file_changed_during_the_hash_is_not_stored(cache, path):
    with path.open("rb") as file:
        before = cache.begin(file.fileno())
        rewrite(path, uncovered(path))
        cache.remember(file.fileno(), before, "a" * 64)
        assert cache.lookup(file.fileno()) is None
    assert list(cache.directory.iterdir()) == []


@pytest.mark.usefixtures("disk", "old")
def test_the_state_is_taken_before_the_hash_begins(cache, path, monkeypatch):
    real = SourceHasher.finish

    def finish(self):
        digest = real(self)
        rewrite(path, uncovered(path))
        return digest

    monkeypatch.setattr(SourceHasher, "finish", finish)
    assert hash_now(cache, path) != sha256(path)
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("young")
def test_a_digest_from_the_writer_counts_at_once(cache, path, disk):
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
def test_a_writer_stores_no_digest_without_reliable_times(cache, path, disk, change, rules):
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
def test_a_damaged_record_is_ignored(cache, path, damage):
    hash_now(cache, path)
    next(cache.directory.iterdir()).write_bytes(damage)
    assert look_up(cache, path) is None
    hash_now(cache, path)
    assert look_up(cache, path) == sha256(path)


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize(("index", "value"), [(0, 3), (2, "a"), (2, 1), (3, 1), (3, "yes")])
def test_a_record_with_other_fields_is_ignored(cache, path, index, value):
    hash_now(cache, path)
    (file,) = cache.directory.iterdir()
    found = json.loads(file.read_bytes())
    found[index] = value
    file.write_text(json.dumps(found))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
def test_a_record_of_an_earlier_version_is_ignored(cache, path):
    status = path.stat()
    stamp = FileStamp.of(status)
    times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    before = [[status.st_dev, status.st_ino, *times], sha256(path)]
    cache.path(stamp).write_text(json.dumps(before))
    assert look_up(cache, path) is None


@pytest.mark.usefixtures("disk", "old")
def test_a_record_is_private_and_written_atomically(cache, path, monkeypatch):
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
def test_a_record_that_cannot_be_written_is_no_error(path, tmp_path, cache, monkeypatch):
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
def test_a_read_only_cache_does_not_touch_its_directory(path, tmp_path, cache):
    before = cache.directory.stat()
    hash_now(replace(cache, read_only=True), path)
    assert FileStamp.of(cache.directory.stat()) == FileStamp.of(before)
    hash_now(DigestCache(tmp_path / "other", read_only=True), path)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("disk", "old")
def test_an_absent_directory_is_created(path, tmp_path):
    cache = DigestCache(tmp_path / "cloned")
    hash_now(cache, path)
    assert look_up(cache, path) == sha256(path)
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700


@pytest.mark.usefixtures("disk", "old")
@pytest.mark.parametrize("broken", ["preadv", "fstatvfs", "fstat"])
def test_a_file_that_cannot_be_observed_has_no_digest(cache, path, monkeypatch, broken):
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


def test_restoring_the_mtime_does_not_hide_a_change(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    stamp = FileStamp.of(path.stat())
    time.sleep(0.01)
    rewrite(path, 0)
    assert FileStamp.of(path.stat()) != stamp


@pytest.mark.usefixtures("disk", "old")
def test_a_forgotten_digest_is_not_found_again(path, cache):
    digest = hash_now(cache, path)
    assert look_up(cache, path) == digest
    stamp = FileStamp.of(path.stat())
    replace(cache, read_only=True).forget(stamp)
    assert look_up(cache, path) == digest
    cache.forget(stamp)
    assert look_up(cache, path) is None
    cache.forget(stamp)  # nothing is there
