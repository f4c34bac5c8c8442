"""Tests of the store: entries, manifests, and temp files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from paroquant_stream.errors import StoreError
from paroquant_stream.files import temp_files
from paroquant_stream.store.damage import keep_damaged
from paroquant_stream.store.store import Store, cache_store
from tests.helpers.builders import temp_of
from tests.helpers.records import manifest_of
from tests.helpers.stores import KEY, publish, temps

NO_PROCESS = 4194305  # over Linux's largest process number


def temp(store: Store, pid: int, **fields: str) -> Path:
    """Create an unlocked temp file with the name that process `pid` of this system gives it."""
    path = store.folder("tmp") / temp_of(pid, **fields)
    path.write_bytes(b"1234")
    return path


def test_a_published_entry_has_its_bytes_and_no_temp(store):
    publish(store, b"hello")
    assert store.entry_path(KEY).read_bytes() == b"hello"
    assert store.entry_size(KEY) == 5
    assert temps(store) == []


def test_an_unpublished_entry_leaves_no_files(store):
    with pytest.raises(RuntimeError), store.new_file(5) as file:
        file.write(memoryview(b"hel"))
        raise RuntimeError
    assert temps(store) == []
    assert store.entry_size(KEY) is None


def test_a_file_of_the_wrong_size_is_not_published(store):
    with pytest.raises(StoreError, match="5 expected"), store.new_file(5) as file:
        file.write(memoryview(b"hel"))
        store.publish_entry(file, KEY)
    assert store.entry_size(KEY) is None
    assert temps(store) == []


def test_a_reader_keeps_the_bytes_of_a_replaced_entry(store):
    publish(store, b"one")
    fd = store.open_entry(KEY)
    publish(store, b"two")
    assert os.pread(fd, 3, 0) == b"one"
    os.close(fd)
    assert store.entry_path(KEY).read_bytes() == b"two"


def test_publishing_syncs_bytes_before_names(store, monkeypatch):
    publish(store, b"x", "ab" + "0" * 62)  # makes the directory
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd):
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        real_fsync(fd)

    def replace(source, target, **where):
        calls.append(f"rename to {target.partition('.')[2]}")
        real_replace(source, target, **where)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    publish(store, b"x")
    digest = ["fsync file", "rename to digest", "fsync directory"]
    entry = ["fsync file", "rename to safetensors", "fsync directory", "fsync directory"]
    assert calls == digest + entry


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_failing_call_keeps_the_old_entry(store, monkeypatch, call, number):
    publish(store, b"old")
    fired = []

    def fail(*_arguments, **_options):
        fired.append(call)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match=os.strerror(number)):
            publish(store, b"new")
    assert fired == [call]  # fsync is never tried twice
    assert store.entry_path(KEY).read_bytes() == b"old"
    assert temps(store) == []


def test_a_full_disk_error_states_needed_and_free_bytes(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"1\.0 kB needed, [\d.]+ [MGT]B free"):
        publish(store, bytes(1000))


def test_a_file_system_without_fallocate_works(store, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    publish(store, b"hello")
    assert store.entry_path(KEY).read_bytes() == b"hello"


def test_short_writes_are_continued(store, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:2], at))
    publish(store, b"hello")
    assert store.entry_path(KEY).read_bytes() == b"hello"


def test_a_link_in_place_of_an_entry_is_not_followed(store, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = store.entry_path(KEY)
    path.parent.mkdir()
    path.symlink_to(victim)
    with pytest.raises(StoreError):
        store.open_entry(KEY)
    publish(store, b"entry")
    assert victim.read_bytes() == b"precious"
    assert store.entry_path(KEY).read_bytes() == b"entry"


@pytest.mark.parametrize("plant", ["link", "file"])
def test_a_file_at_a_temp_name_is_not_overwritten(store, tmp_path, monkeypatch, plant):
    monkeypatch.setattr(temp_files.os, "urandom", bytes)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    temp = store.folder("tmp") / temp_of(os.getpid())
    temp.symlink_to(victim) if plant == "link" else os.link(victim, temp)
    with pytest.raises(StoreError, match="File exists"):
        publish(store, b"entry")
    assert victim.read_bytes() == b"precious"
    assert os.path.lexists(temp)


def test_the_next_sweep_removes_a_leftover_temp(store, monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, store.new_file(1) as kept:
        patch.setattr(os, "unlink", fail)
        with store.new_file(1):
            pass
        patch.undo()
        assert len(temps(store)) == 2
        store.sweep()
        assert len(temps(store)) == 1  # the one that is being written
        kept.write(memoryview(b"x"))
        store.publish_entry(kept, KEY)


def test_a_sweep_by_another_path_keeps_an_open_temp(store, tmp_path):
    (tmp_path / "link").symlink_to(store.root)
    with store.new_file(1) as file:
        assert Store(tmp_path / "link").sweep() == 0
        file.write(memoryview(b"x"))
        store.publish_entry(file, KEY)


def test_a_sweep_removes_only_temps_of_dead_processes(store):
    dead = temp(store, NO_PROCESS)
    restarted = temp(store, 1, boot="ffffffff")
    other = temp(store, 1, boot="ffffffff", machine="ffffffff")
    expired = temp(store, 2, boot="ffffffff", machine="ffffffff")
    strange = store.folder("tmp") / "notes.txt"
    strange.write_text("mine")
    for path in (restarted, expired, strange):
        os.utime(path, (0, 0))
    assert store.sweep() == 12
    assert set(store.folder("tmp").iterdir()) == {other, strange}
    assert not dead.exists()


def test_a_sweep_keeps_a_locked_temp_of_any_name_and_age(store):
    path = temp(store, NO_PROCESS)
    os.utime(path, (0, 0))
    with path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert store.sweep() == 0
    assert store.sweep() == 4


def test_a_sweep_removes_old_temps_of_another_container(store):
    path = temp(store, 1, space=1)  # a process 1 that is not ours
    assert store.sweep() == 0  # just made, and perhaps not locked yet
    os.utime(path, (0, 0))
    assert store.sweep() == 4


def test_without_locks_a_sweep_checks_process_and_lease(store, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    alive, dead = temp(store, os.getppid()), temp(store, NO_PROCESS)
    near, gone = temp(store, 1, space=1), temp(store, 2, space=1)
    for path in (alive, gone):
        os.utime(path, (0, 0))
    assert store.sweep() == 8
    assert set(store.folder("tmp").iterdir()) == {alive, near}
    assert not dead.exists()


def test_a_writer_renews_its_lease(store, monkeypatch):
    monkeypatch.setattr(temp_files, "RENEW", 0.01)
    monkeypatch.setattr(temp_files, "_renewer", threading.Lock())
    with store.new_file(1) as file:
        os.utime(file.path, (0, 0))
        until = time.monotonic() + 20
        while file.path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert file.path.stat().st_mtime > 0


def test_the_next_sweep_removes_a_discarded_entry(store):
    publish(store, b"bad")
    store.discard_entry(KEY)
    assert store.entry_size(KEY) is None
    assert store.sweep() == 3
    assert temps(store) == []


def test_a_read_only_store_changes_nothing(store):
    publish(store, b"bad")
    looked = replace(store, read_only=True)
    looked.discard_entry(KEY)
    assert keep_damaged(looked, KEY) is None
    with pytest.raises(StoreError, match="is opened read-only"):
        publish(looked, b"new")
    assert store.entry_path(KEY).read_bytes() == b"bad"


def test_the_digest_file_has_the_writers_digest(store):
    publish(store, b"right")
    assert store.entry_digest(KEY) == xxhash.xxh3_128(b"right").hexdigest()
    path = store.entry_path(KEY)
    path.write_bytes(b"wrong")
    assert store.entry_digest(KEY) == xxhash.xxh3_128(b"right").hexdigest()
    path.write_bytes(b"longer")
    assert store.entry_digest(KEY) is None
    path.with_name(f"{KEY}.digest").write_bytes(b"nonsense")
    assert store.entry_digest(KEY) is None
    path.with_name(f"{KEY}.digest").unlink()
    assert store.entry_digest(KEY) is None


def test_an_absent_manifest_or_a_directory_is_none(store):
    assert store.load_manifest("m") is None
    store.manifest_path("m").mkdir()
    assert store.load_manifest("m") is None


def test_a_damaged_or_newer_manifest_is_none(store):
    store.write_manifest("m", manifest_of())
    assert store.load_manifest("m") == manifest_of()
    path = store.manifest_path("m")
    data = bytearray(path.read_bytes())
    for position in (-1, 10):  # the body, and the major version
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert store.load_manifest("m") is None


def test_only_manifests_are_listed(store):
    store.write_manifest("m", manifest_of())
    store.write_file("manifests", "m.msgpack.removed", b"")
    assert store.manifest_names() == ["m"]


def test_touching_a_manifest_sets_its_mtime_and_nothing_else(store):
    store.write_manifest("m", manifest_of())
    path = store.manifest_path("m")
    os.utime(path, (0, 0))
    store.touch_manifest("m")
    assert path.stat().st_mtime > 0
    store.touch_manifest("absent")
    assert store.manifest_names() == ["m"]


def test_a_link_in_place_of_a_manifest_is_not_touched(store, tmp_path):
    (tmp_path / "victim").write_text("")
    os.utime(tmp_path / "victim", (0, 0))
    store.manifest_path("m").symlink_to(tmp_path / "victim")
    store.touch_manifest("m")
    assert (tmp_path / "victim").stat().st_mtime == 0


def test_the_given_directory_or_the_users_is_the_cache(tmp_path, monkeypatch):
    assert cache_store(tmp_path).root == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_store("~/x").root == tmp_path / "x"
    assert cache_store().root == tmp_path / "user-cache"
