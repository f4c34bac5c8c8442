"""Temp files: a sweep removes leftovers and spares what is being written."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time

import pytest

from paroquant_stream.files import temp_files
from paroquant_stream.files.atomic_file import AtomicFile
from paroquant_stream.files.folder import Folder
from paroquant_stream.files.temp_files import (
    GRACE,
    LEASE,
    announce,
    is_dead,
    is_held,
    is_open,
    is_own,
    is_temp,
    release,
    sweep,
    temp_name,
)
from tests.helpers.builders import temp_of

NO_PROCESS = 4194305  # over Linux's largest process id
ELSEWHERE = {"boot": "ffffffff", "machine": "ffffffff"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tmp").mkdir()
    with Folder.open(tmp_path / "tmp") as folder:
        yield folder


def make(folder: Folder, pid: int, age: float = 0, **fields: str | int) -> str:
    """An unlocked temp file of a process, of an age in seconds; returns its name."""
    name = temp_of(pid, **fields)
    path = folder.path / name
    path.write_bytes(b"1234")
    then = time.time() - age
    os.utime(path, (then, then))
    return name


def test_names_are_new_and_known_as_those_of_this_process():
    first, second = temp_name(), temp_name()
    assert first != second
    assert is_temp(first)
    assert is_own(first)
    assert not is_own(temp_of(os.getpid() + 1))
    assert not is_own(temp_of(os.getpid(), **ELSEWHERE))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (temp_of(7), True),
        ("01234567-12-" + "0" * 32, True),  # of earlier versions
        ("01234567-12-" + "0" * 31, False),
        (f"notes-{temp_of(7)}", False),
        (f"{temp_of(7)}.txt", False),
        ("notes.txt", False),
    ],
)
def test_only_names_of_the_right_form_are_temps(name, known):
    assert is_temp(name) is known


def test_an_announced_temp_is_open_until_it_is_released():
    name = temp_name()
    assert not is_open(name)
    announce(name)
    assert is_open(name)
    release(name)
    release(name)
    assert not is_open(name)


@pytest.mark.parametrize(
    ("pid", "age", "fields", "dead"),
    [
        (NO_PROCESS, 0, {}, True),
        (10**30, 0, {}, True),  # no process id at all
        (os.getppid(), GRACE / 2, {}, False),
        (os.getppid(), 2 * GRACE, {}, True),  # a living process would hold the lock
        (1, GRACE / 2, {"space": 1}, False),  # perhaps not locked yet
        (1, 2 * GRACE, {"space": 1}, True),
        (1, LEASE / 2, ELSEWHERE, False),
        (1, 2 * LEASE, ELSEWHERE, True),
    ],
)
def test_where_locks_work_an_unlocked_temp_is_dead(folder, pid, age, fields, dead):
    assert is_dead(folder, make(folder, pid, age, **fields), locks=True) is dead


@pytest.mark.parametrize(
    ("pid", "age", "fields", "dead"),
    [
        (NO_PROCESS, 0, {}, True),
        (os.getppid(), 2 * LEASE, {}, False),
        (1, LEASE / 2, {"space": 1}, False),
        (1, 2 * LEASE, {"space": 1}, True),
        (1, LEASE / 2, ELSEWHERE, False),
        (1, 2 * LEASE, ELSEWHERE, True),
    ],
)
def test_without_locks_the_process_or_the_lease_decides(folder, pid, age, fields, dead):
    assert is_dead(folder, make(folder, pid, age, **fields), locks=False) is dead


def test_a_file_system_that_refuses_locks_has_none(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    alive = make(folder, os.getppid(), 2 * LEASE)
    assert not is_dead(folder, alive, locks=True)


def test_a_temp_of_before_the_restart_is_dead(folder):
    booted = temp_files._this_system().booted  # private: no public name for the time of the boot
    if not booted:
        pytest.skip("this system does not say when it was started")
    age = time.time() - booted
    assert is_dead(folder, make(folder, 1, age + 60, boot="ffffffff"), locks=True)
    after = max(age - 60, 0)
    assert not is_dead(folder, make(folder, 2, min(after, 60), boot="ffffffff"), locks=True)


def test_a_process_of_another_user_is_running(folder, monkeypatch):
    def refuse(_pid, _signal):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_dead(folder, make(folder, 1), locks=False)


def test_what_is_no_temp_file_is_not_dead(folder):
    assert not is_dead(folder, temp_of(NO_PROCESS), locks=True)
    os.mkfifo(folder.path / temp_of(NO_PROCESS))
    assert not is_dead(folder, temp_of(NO_PROCESS), locks=True)


def test_a_temp_with_another_end_counts_by_its_lease(folder):
    for name, age, dead in (("x.part", LEASE / 2, False), ("y.part", 2 * LEASE, True)):
        (folder.path / name).write_bytes(b"")
        then = time.time() - age
        os.utime(folder.path / name, (then, then))
        assert is_dead(folder, name, locks=True) is dead


def test_a_locked_temp_is_held_and_not_dead(folder):
    name = make(folder, NO_PROCESS, 2 * LEASE)
    with (folder.path / name).open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert is_held(folder, name)
        assert not is_dead(folder, name, locks=True)
        assert sweep(folder, locks=True, own=False) == 0
    assert not is_held(folder, name)
    assert not is_held(folder, "absent")
    assert sweep(folder, locks=True, own=False) == 4


def test_two_sweeps_can_test_a_lock_at_once(folder):
    name = make(folder, NO_PROCESS)
    with (folder.path / name).open("rb") as other_sweep:
        fcntl.flock(other_sweep, fcntl.LOCK_SH)
        assert is_dead(folder, name, locks=True)


def test_a_sweep_removes_leftovers_only(folder):
    leftover, alive = make(folder, NO_PROCESS), make(folder, os.getppid())
    (folder.path / "notes.txt").write_bytes(b"notes")
    os.utime(folder.path / "notes.txt", (0, 0))
    assert sweep(folder, locks=True, own=False) == 4
    assert leftover not in folder.names()
    assert folder.names() == sorted([alive, "notes.txt"])


def test_a_sweep_spares_open_temps_of_its_own_unless_asked(folder):
    name = temp_name()
    file = AtomicFile(folder, name, 4, 0o600)
    assert sweep(folder, locks=True, own=False) == 0
    assert folder.names() == [name]
    assert sweep(folder, locks=True, own=True) == os.fstat(file.fd).st_size
    file.discard()
    assert folder.names() == []


def test_a_temp_that_was_not_removed_goes_with_the_next_sweep(folder, monkeypatch):
    name = make(folder, os.getpid())
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "unlink", lambda *_: (_ for _ in ()).throw(PermissionError()))
        assert sweep(folder, locks=True, own=False) == 0
    assert folder.names() == [name]
    assert sweep(folder, locks=True, own=False) == 4


def test_a_writer_locks_its_temp_even_when_a_sweep_tests_it(folder, monkeypatch):
    real, refused = fcntl.flock, []

    def busy_first(fd, operation):
        if len(refused) < 3:
            refused.append(operation)
            raise BlockingIOError
        return real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", busy_first)
    file = AtomicFile(folder, temp_name(), 0, 0o600)
    assert refused == [fcntl.LOCK_EX | fcntl.LOCK_NB] * 3
    assert is_held(folder, file.path.name)
    file.discard()


def test_a_writer_renews_its_lease(folder, monkeypatch):
    monkeypatch.setattr(temp_files, "RENEW", 0.01)
    # private: the thread of this process may have been started with the long interval
    monkeypatch.setattr(temp_files, "_renewer", threading.Lock())
    file = AtomicFile(folder, temp_name(), 0, 0o600)
    os.utime(file.path, (0, 0))
    until = time.monotonic() + 60
    while file.path.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert file.path.stat().st_mtime > 0
    file.discard()


def test_a_file_is_written_where_no_thread_can_be_started(folder, monkeypatch):
    tried = []

    def refuse(thread):
        tried.append(thread.name)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(temp_files, "_renewer", threading.Lock())  # private: as in a new process
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(2):
        AtomicFile(folder, temp_name(), 0, 0o600).discard()
    assert tried == ["leases"] * 2  # the next file tries again


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside the renewing thread
def test_a_forked_child_does_not_own_its_parents_temps(folder):
    file = AtomicFile(folder, temp_name(), 0, 0o600)
    child = os.fork()
    if child == 0:
        os._exit(is_open(file.path.name) + 2 * is_own(file.path.name))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_open(file.path.name)
    file.discard()
