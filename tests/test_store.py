"""The store: what is published is whole, durable and private."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time

import pytest

from paroquant_stream import store as store_module
from paroquant_stream.errors import StoreError
from paroquant_stream.store import Store, user_cache_root

KEY = "ab" * 32


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "cache")
    store.create()
    return store


def publish(store: Store, data: bytes, key: str = KEY) -> None:
    with store.new_file(len(data)) as file:
        file.write(memoryview(data))
        file.publish(store.entry_path(key))


def temps(store: Store) -> list[str]:
    return os.listdir(store.root / "v1" / "tmp")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(tmp_path))
    assert user_cache_root() == tmp_path
    monkeypatch.delenv("PAROQUANT_STREAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_root() == tmp_path / "xdg" / "paroquant" / "mlx_cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache_root() == tmp_path / "home" / ".cache" / "paroquant" / "mlx_cache"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_cache_that_others_can_write_into_is_refused_with_the_remedy(store, mode):
    store.check_owner()
    store.root.chmod(mode)
    with pytest.raises(StoreError, match="chmod go-w"):
        store.check_owner()


def test_a_cache_of_another_user_is_refused_with_the_remedy(store, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match=r"not by you \(12345\).*--cache-dir"):
        store.check_owner()


def test_a_cache_whose_owner_cannot_be_told_is_refused(store, monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(StoreError, match="cannot be looked at: Input/output error"):
        store.check_owner()


def test_a_cut_short_tag_is_written_again(store):
    tag = store.root / "CACHEDIR.TAG"
    whole = tag.read_text()
    tag.write_text("")
    store.create()
    assert tag.read_text() == whole


def test_a_temp_that_could_not_be_removed_goes_with_the_next_sweep(store, monkeypatch):
    from pathlib import Path

    def fail(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, store.new_file(1) as kept:
        patch.setattr(Path, "unlink", fail)
        with store.new_file(1):
            pass
        patch.undo()
        assert len(temps(store)) == 2
        store.sweep()
        assert len(temps(store)) == 1  # the one that is being written
        kept.write(memoryview(b"x"))
        kept.publish(store.entry_path(KEY))


def test_a_temp_that_is_being_written_is_spared_by_a_sweep_through_another_path(store, tmp_path):
    (tmp_path / "link").symlink_to(store.root)
    with store.new_file(1) as file:
        assert Store(tmp_path / "link").sweep() == 0
        file.write(memoryview(b"x"))
        file.publish(store.entry_path(KEY))


def test_a_tree_beside_a_model_and_an_absent_cache_have_no_owner_to_check(store, tmp_path):
    store.root.chmod(0o777)
    Store(store.root, private=False).check_owner()
    Store(tmp_path / "absent").check_owner()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_directories_are_0700_and_files_0600_under_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "private")
        store.create()
        publish(store, b"x")
    finally:
        os.umask(before)
    for path in (store.root, *store.root.rglob("*")):
        if path.name != "CACHEDIR.TAG":
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_tree_beside_a_model_follows_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        store = Store(tmp_path / "mlx", private=False)
        store.create()
        publish(store, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.entry_path(KEY).stat().st_mode) == 0o644
    assert stat.S_IMODE(store.entry_path(KEY).parent.stat().st_mode) == 0o755


def test_a_published_entry_has_the_bytes_and_leaves_no_temp(store):
    publish(store, b"hello")
    assert store.entry_path(KEY).read_bytes() == b"hello"
    assert store.entry_size(KEY) == 5
    assert temps(store) == []


def test_an_entry_that_is_not_published_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.new_file(5) as file:
        file.write(memoryview(b"hel"))
        raise RuntimeError
    assert temps(store) == []
    assert store.entry_size(KEY) is None


def test_a_file_of_the_wrong_size_is_never_published(store):
    with pytest.raises(StoreError, match="5 expected"), store.new_file(5) as file:
        file.write(memoryview(b"hel"))
        file.publish(store.entry_path(KEY))
    assert store.entry_size(KEY) is None
    assert temps(store) == []


def test_a_reader_of_a_replaced_entry_keeps_its_bytes(store):
    publish(store, b"one")
    fd = store.open_entry(KEY)
    publish(store, b"two")
    assert os.pread(fd, 3, 0) == b"one"
    os.close(fd)
    assert store.entry_path(KEY).read_bytes() == b"two"


def test_publishing_syncs_the_file_then_renames_then_syncs_the_directory(store, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd):
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        real_fsync(fd)

    def replace(*paths):
        calls.append("rename")
        real_replace(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    publish(store, b"x")
    assert calls == ["fsync file", "rename", "fsync directory", "fsync directory"]


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_failing_call_is_a_store_error_and_keeps_the_old_entry(store, monkeypatch, call, number):
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


def test_a_full_disk_says_how_much_is_needed_and_free(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"1,000 bytes needed, [\d,]+ free"):
        publish(store, bytes(1000))


def test_a_file_system_without_fallocate_is_fine(store, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    publish(store, b"hello")
    assert store.entry_path(KEY).read_bytes() == b"hello"


def test_short_writes_are_continued(store, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:2]))
    publish(store, b"hello")
    assert store.entry_path(KEY).read_bytes() == b"hello"


def test_a_lost_write_is_noticed_before_the_rename(store, monkeypatch):
    monkeypatch.setattr(os, "write", lambda _fd, data: len(data))
    with pytest.raises(StoreError, match="0 bytes on disk"):
        publish(store, b"hello")


def test_a_link_planted_for_an_entry_is_not_followed(store, tmp_path):
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
def test_what_is_planted_at_a_temp_name_is_neither_followed_nor_written(
    store, tmp_path, monkeypatch, plant
):
    monkeypatch.setattr(store_module.secrets, "token_hex", lambda _: "0" * 32)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    temp = store.root / "v1" / "tmp" / f"{store_module._host()}-{os.getpid()}-{'0' * 32}"
    temp.symlink_to(victim) if plant == "link" else os.link(victim, temp)
    with pytest.raises(StoreError, match="File exists"):
        publish(store, b"entry")
    assert victim.read_bytes() == b"precious"


def test_the_sweep_removes_temps_of_dead_runs_and_no_others(store):
    tmp = store.root / "v1" / "tmp"
    host = store_module._host()
    dead, alive, foreign, old = (
        tmp / f"{host}-4194305-{'0' * 32}",  # over Linux's largest process number
        tmp / f"{host}-{os.getppid()}-{'0' * 32}",
        tmp / f"ffffffff-1-{'0' * 32}",
        tmp / f"ffffffff-2-{'0' * 32}",
    )
    for path in (dead, alive, foreign, old):
        path.write_bytes(b"1234")
    os.utime(old, (0, 0))
    assert store.sweep() == 8
    assert set(tmp.iterdir()) == {alive, foreign}


def test_a_clock_that_jumps_removes_no_temp_of_a_live_writer(store):
    live = store.root / "v1" / "tmp" / f"{store_module._host()}-{os.getppid()}-{'0' * 32}"
    live.write_bytes(b"x")
    os.utime(live, (0, 0))  # as after a clock that went ahead by decades
    assert store.sweep() == 0
    assert live.exists()


def test_a_quarantined_entry_is_a_miss(store):
    publish(store, b"bad")
    store.quarantine(KEY)
    assert store.entry_size(KEY) is None
    assert len(temps(store)) == 1


def test_a_lock_holds_two_threads_apart(store):
    inside, most = [], []

    def work():
        with store.lock("m"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_file_system_without_locks_only_warns(store, monkeypatch, caplog):
    class NoLock:
        def __init__(self, *_, **__):
            pass

        def acquire(self, **_):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.UnixFileLock", NoLock)
    with store.lock("m"):
        pass
    assert "without the lock" in caplog.text


def test_a_place_that_cannot_be_made_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--cache-dir"):
        Store(tmp_path / "file" / "cache").create()


def test_a_manifest_that_is_absent_or_a_directory_reads_as_none(store):
    assert store.read_manifest("m", 100) is None
    store.manifest_path("m").mkdir()
    assert store.read_manifest("m", 100) is None


def test_free_bytes_of_a_store_that_is_not_there_are_those_of_its_parent(tmp_path):
    assert Store(tmp_path / "a" / "b").free_bytes() > 0
