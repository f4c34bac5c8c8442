"""Tests of the locks of conversions, removals and model directories."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import warnings
from functools import partial

import filelock
import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files.folder import Folder
from paroquant_stream.store import lock
from paroquant_stream.store.lock import GATE, directory_lock, locks_exclude
from paroquant_stream.store.store import Store


def test_one_thread_at_a_time_holds_a_lock(store):
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


def test_a_forked_child_can_take_a_lock_held_at_the_fork(store):
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


def test_no_conversion_starts_during_a_removal(store):
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


def test_a_waiting_conversion_does_not_block_others(store):
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


def lock_of(directory, *, exclusive: bool, required: bool = False):
    return directory_lock(partial(Folder.open, directory), exclusive=exclusive, required=required)


@pytest.fixture
def impatient(monkeypatch):
    """Let locks time out at once."""
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0.0)


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, False)],
)
@pytest.mark.usefixtures("impatient")
def test_only_shared_directory_locks_are_held_together(tmp_path, first, second, allowed):
    with lock_of(tmp_path, exclusive=first):
        if allowed:
            with lock_of(tmp_path, exclusive=second, required=True) as folder:
                assert folder.path == tmp_path
        else:
            with (
                pytest.raises(StoreError, match="another conversion of this model held its lock"),
                lock_of(tmp_path, exclusive=second, required=True),
            ):
                pytest.fail("both hold the lock")
    with lock_of(tmp_path, exclusive=True, required=True):
        pass


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_is_not_required_only_warns(tmp_path, caplog):
    with lock_of(tmp_path, exclusive=True), lock_of(tmp_path, exclusive=True) as folder:
        assert folder is not None
    assert f"continuing without the lock of {tmp_path}: another conversion" in caplog.text


def test_a_directory_lock_is_waited_for(tmp_path):
    order, held = [], threading.Event()

    def hold():
        with lock_of(tmp_path, exclusive=True):
            held.set()
            time.sleep(0.15)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    with lock_of(tmp_path, exclusive=True, required=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_directory_lock_is_released_though_a_child_has_it_open(tmp_path):
    with lock_of(tmp_path, exclusive=True) as folder:
        copy = os.dup(folder.fd)  # shares the open file, as after a fork
    try:
        with lock_of(tmp_path, exclusive=True, required=True):
            pass
    finally:
        os.close(copy)


def test_an_absent_directory_is_an_error_only_if_required(tmp_path):
    with lock_of(tmp_path / "absent", exclusive=True) as folder:
        assert folder is None
    with (
        pytest.raises(StoreError, match="cannot be locked: "),
        lock_of(tmp_path / "absent", exclusive=True, required=True),
    ):
        pytest.fail("locked")


def test_a_required_lock_needs_locks_that_exclude(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with lock_of(tmp_path, exclusive=True) as folder:
        assert folder is not None
    with (
        pytest.raises(StoreError, match=r"locks do nothing on this file system; .*--drop-source"),
        lock_of(tmp_path, exclusive=True, required=True),
    ):
        pytest.fail("locked")


def test_a_flock_error_is_named(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock_of(tmp_path, exclusive=False):
        pass
    assert "it cannot be locked: No locks available" in caplog.text
    with Folder.open(tmp_path) as folder:
        assert not locks_exclude(folder)


@pytest.mark.parametrize("held", [None, fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_the_test_of_locks_keeps_those_that_are_held(tmp_path, held):
    with Folder.open(tmp_path) as holder, Folder.open(tmp_path) as other:
        if held:
            fcntl.flock(holder.fd, held)
        assert locks_exclude(holder)
        if held:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.flock(other.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_store_in_a_model_has_one_lock(tmp_path, monkeypatch, caplog):
    store = Store(tmp_path / "mlx", private=False)
    store.create()
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0.0)
    with store.lock("one"), store.lock("two"):
        pass
    assert "continuing without the lock" in caplog.text
    assert store.locks_work()


@pytest.mark.usefixtures("impatient")
def test_a_conversion_continues_when_its_lock_is_held_too_long(store, caplog):
    with store.lock("m"), store.lock("m"):
        pass
    assert "continuing without the lock" in caplog.text
    assert not filelock.UnixFileLock(store.folder("locks") / GATE).is_locked
    with store.removal():
        pass


def test_two_removals_at_once_are_refused(store, monkeypatch):
    # private: the time is fixed, and far too long for a test
    monkeypatch.setattr(lock, "_GATE_TIMEOUT", 0.05)
    with (
        store.removal(),
        pytest.raises(StoreError, match="held for 0 s by another removal"),
        store.removal(),
    ):
        pytest.fail("both hold the gate")
    with store.removal():
        pass


def test_lock_files_have_the_mode_of_the_store(store):
    before = os.umask(0)
    try:
        with store.lock("m"), store.removal():
            pass
    finally:
        os.umask(before)
    files = list(store.folder("locks").iterdir())
    assert {path.name for path in files} == {"m.lock", GATE}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_without_a_locks_directory_no_lock_is_taken(store):
    for path in store.folder("locks").iterdir():
        path.unlink()
    store.folder("locks").rmdir()
    with store.lock("m"), store.removal():
        pass
    assert not store.folder("locks").exists()
