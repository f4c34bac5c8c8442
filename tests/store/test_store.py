"""The store: what is published is whole, durable and private."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from paroquant_stream.errors import StoreError
from paroquant_stream.files import temp_files
from paroquant_stream.files.folder import Folder
from paroquant_stream.store.damage import damaged_path, keep_damaged
from paroquant_stream.store.location import user_cache_root
from paroquant_stream.store.store import Store
from tests.helpers.builders import temp_of

KEY = "ab" * 32
NOBODY = 4194305  # over Linux's largest process number


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "cache")
    store.create()
    return store


def publish(store: Store, data: bytes, key: str = KEY) -> None:
    with store.new_file(len(data)) as file:
        file.write(memoryview(data))
        store.publish_entry(file, key)


def temp(store: Store, pid: int, **fields: str) -> Path:
    """A temp that process `pid` of this system would write, and that nobody has locked."""
    path = store.folder("tmp") / temp_of(pid, **fields)
    path.write_bytes(b"1234")
    return path


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

    monkeypatch.setattr(Folder, "status", fail)
    with pytest.raises(StoreError, match="cannot be opened: Input/output error"):
        store.check_owner()


@pytest.mark.parametrize("below", ["v1", "v1/entries", "v1/entries/ab", "v1/tmp", "v1/manifests"])
def test_a_directory_of_the_cache_that_others_can_write_into_is_refused(store, below):
    publish(store, b"x")
    (store.root / below).chmod(0o777)
    with pytest.raises(StoreError, match=f"{below}: others can write into it .*chmod go-w"):
        publish(store, b"y")
        store.write_file("manifests", "m.msgpack", b"z")


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("below", ["v1", "v1/entries", "v1/entries/ab", "v1/tmp", "v1/manifests"])
def test_a_link_below_the_root_is_not_followed(tmp_path, below, private):
    store = Store(tmp_path / "model" / "mlx", private=private)
    (tmp_path / "model").mkdir()
    store.create()
    publish(store, b"x")
    outside = tmp_path / "outside"
    (store.root / below).rename(outside)
    (store.root / below).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(StoreError, match=f"{below}: expected a directory, found a link"):
        publish(store, b"y")
        store.write_file("manifests", "m.msgpack", b"z")
    assert sorted(outside.rglob("*")) == before


def test_a_tree_beside_a_model_is_no_link_and_a_cache_may_be_one(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(StoreError, match="link: expected a directory, found a link"):
        Store(tmp_path / "link", private=False).create()
    assert not list(outside.iterdir())
    store = Store(tmp_path / "link")
    store.create()
    publish(store, b"x")
    assert store.entry_size(KEY) == 1


def test_a_tree_beside_a_model_has_its_directorys_trust_and_no_more(tmp_path):
    model = tmp_path / "model"
    model.mkdir(mode=0o755)
    store = Store(model / "mlx", private=False)
    store.create()
    store.folder("entries").chmod(0o777)
    with pytest.raises(StoreError, match="others can write into it"):
        publish(store, b"x")
    model.chmod(0o777)
    publish(store, b"x")


def test_a_cut_short_tag_is_written_again(store):
    tag = store.root / "CACHEDIR.TAG"
    whole = tag.read_text()
    tag.write_text("")
    store.create()
    assert tag.read_text() == whole


def test_a_temp_that_could_not_be_removed_goes_with_the_next_sweep(store, monkeypatch):
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


def test_a_temp_that_is_being_written_is_spared_by_a_sweep_through_another_path(store, tmp_path):
    (tmp_path / "link").symlink_to(store.root)
    with store.new_file(1) as file:
        assert Store(tmp_path / "link").sweep() == 0
        file.write(memoryview(b"x"))
        store.publish_entry(file, KEY)


def test_a_tree_beside_a_model_and_an_absent_cache_have_no_owner_to_check(store, tmp_path):
    store.root.chmod(0o777)
    tmp_path.chmod(0o777)
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
        store.publish_entry(file, KEY)
    assert store.entry_size(KEY) is None
    assert temps(store) == []


def test_a_reader_of_a_replaced_entry_keeps_its_bytes(store):
    publish(store, b"one")
    fd = store.open_entry(KEY)
    publish(store, b"two")
    assert os.pread(fd, 3, 0) == b"one"
    os.close(fd)
    assert store.entry_path(KEY).read_bytes() == b"two"


def test_publishing_syncs_the_digest_and_the_entry_before_their_names(store, monkeypatch):
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
    with pytest.raises(StoreError, match="0 bytes written"):
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
    monkeypatch.setattr(temp_files.os, "urandom", bytes)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    temp = store.folder("tmp") / temp_of(os.getpid())
    temp.symlink_to(victim) if plant == "link" else os.link(victim, temp)
    with pytest.raises(StoreError, match="File exists"):
        publish(store, b"entry")
    assert victim.read_bytes() == b"precious"
    assert os.path.lexists(temp)


def test_the_sweep_removes_temps_of_dead_runs_and_no_other_file(store):
    dead = temp(store, NOBODY)
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


def test_a_temp_whose_writer_holds_its_lock_stays_whatever_its_name_and_age_say(store):
    path = temp(store, NOBODY)
    os.utime(path, (0, 0))
    with path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert store.sweep() == 0
    assert store.sweep() == 4


def test_a_temp_of_another_namespace_of_processes_goes_once_nobody_holds_it(store):
    path = temp(store, 1, space=1)  # a process 1 that is not ours
    assert store.sweep() == 0  # just made, and perhaps not locked yet
    os.utime(path, (0, 0))
    assert store.sweep() == 4


def test_where_locks_do_nothing_the_name_and_the_lease_tell(store, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    alive, dead = temp(store, os.getppid()), temp(store, NOBODY)
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


def test_an_entry_that_can_be_made_again_goes_with_the_next_sweep(store):
    publish(store, b"bad")
    store.discard_entry(KEY)
    assert store.entry_size(KEY) is None
    assert store.sweep() == 3
    assert temps(store) == []


def test_a_damaged_entry_that_cannot_be_made_again_is_kept_each_time(store):
    for number in (1, 2):
        publish(store, b"bad")
        kept = keep_damaged(store, KEY)
        assert kept == store.folder("damaged") / f"{KEY}.{number}.safetensors"
        assert store.entry_size(KEY) is None
    assert store.sweep() == 0
    assert damaged_path(store, KEY) == kept
    assert kept.read_bytes() == b"bad"


def test_a_store_that_is_only_read_changes_nothing(store):
    publish(store, b"bad")
    looked = replace(store, read_only=True)
    looked.discard_entry(KEY)
    assert keep_damaged(looked, KEY) is None
    with pytest.raises(StoreError, match="is opened read-only"):
        publish(looked, b"new")
    assert store.entry_path(KEY).read_bytes() == b"bad"


def test_the_digest_beside_an_entry_is_the_one_of_its_writer(store):
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


def test_a_child_that_was_forked_while_a_thread_held_a_lock_can_take_it_later(store):
    held, release = threading.Event(), threading.Event()

    def hold():
        with store.lock("m"):
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a process with threads is forked is the point
        child = os.fork()
    if not child:
        with store.lock("m"):
            os._exit(7)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_no_conversion_begins_while_something_is_removed(store):
    begun, order = threading.Event(), []

    def convert():
        begun.set()
        with store.lock("m"):
            order.append("conversion")

    with store.removal():
        thread = threading.Thread(target=convert)
        thread.start()
        begun.wait(20)
        time.sleep(0.3)  # more than a look at the gate
        order.append("removal")
    thread.join()
    assert order == ["removal", "conversion"]


def test_a_conversion_that_waits_for_its_model_keeps_no_other_from_beginning(store):
    waiting = threading.Thread(target=lambda: store.lock("m").__enter__())
    with store.lock("m"):
        waiting.start()
        with store.lock("other"):
            pass
        with store.removal():
            pass
    waiting.join()


def test_a_file_system_without_locks_only_warns(store, monkeypatch, caplog):
    class NoLock:
        def __init__(self, *_, **__):
            pass

        def acquire(self, **_):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.UnixFileLock", NoLock)
    with store.lock("m"):
        pass
    assert "continuing without the lock" in caplog.text


def test_a_place_that_cannot_be_made_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--cache-dir"):
        Store(tmp_path / "file" / "cache").create()


def test_a_manifest_that_is_absent_or_a_directory_reads_as_none(store):
    assert store.load_manifest("m") is None
    store.manifest_path("m").mkdir()
    assert store.load_manifest("m") is None


def test_free_bytes_of_a_store_that_is_not_there_are_those_of_its_parent(tmp_path):
    assert Store(tmp_path / "a" / "b").free_bytes() > 0
