"""A wait for another run's lock is told once, with the process where the system names it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading

import pytest

from paroquant_stream.files.folder import Folder
from paroquant_stream.store import waiting
from paroquant_stream.store.lock import GATE, directory_lock
from paroquant_stream.store.waiting import Wait, holder

HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""
SHOWN = os.path.exists("/proc/locks")


@pytest.fixture
def held():
    """Start a process that merely holds a shared lock of a file; `release` ends it."""
    started = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)


def until_logged(monkeypatch, process):
    """Release the lock once the wait was logged, so that no test waits by the clock."""
    real = waiting.logger.warning

    def warn(*arguments):
        real(*arguments)
        threading.Thread(target=process.communicate).start()

    monkeypatch.setattr(waiting.logger, "warning", warn)


def test_a_short_wait_is_not_told(caplog, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    wait = Wait()
    for clock[0] in (0.0, 0.9):
        wait.notice("it", tmp_path)
    assert caplog.text == ""
    for clock[0] in (1.0, 2.0):
        wait.notice("it", tmp_path)
    assert caplog.messages == [f"waiting for it (which holds {tmp_path})"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("name", "whose"), [("m.lock", "another conversion of this model"), (GATE, "a removal from")]
)
def test_a_shared_lock_of_a_lock_file_is_told(store, held, monkeypatch, caplog, name, whose):
    with store.lock("m"):
        path = store.folder("locks") / name
    process = held(path)
    until_logged(monkeypatch, process)
    with store.lock("m"):
        pass
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"waiting for {whose}")
    assert str(path) in caplog.text
    assert (f"(pid {process.pid}, which" in caplog.text) == SHOWN


@pytest.mark.usefixtures("impatient")
def test_a_locked_model_directory_is_told(tmp_path, held, monkeypatch, caplog):
    process = held(tmp_path)
    until_logged(monkeypatch, process)
    with directory_lock(lambda: Folder.open(tmp_path), exclusive=True, required=True):
        pass
    assert caplog.text.count("waiting for another conversion of this model") == 1
    assert (f"pid {process.pid}" in caplog.text) == SHOWN


@pytest.mark.parametrize(
    "text", ["", "nonsense", "1: FLOCK ADVISORY READ 0 {id} 0", "1: -> FLOCK ADVISORY READ 7 {id}"]
)
def test_without_a_line_for_the_lock_there_is_no_process(tmp_path, monkeypatch, text):
    status = tmp_path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    locks = tmp_path / "locks"
    monkeypatch.setattr(waiting, "_LOCKS", locks)  # private: the system's own file
    assert holder(tmp_path) is None
    locks.write_text(text.format(id=f"{device}:{status.st_ino}"))
    assert holder(tmp_path) is None
    locks.write_text(f"1: FLOCK ADVISORY WRITE 9 {device}:{status.st_ino} 0 EOF\n")
    assert holder(tmp_path) == 9


def test_the_holder_of_a_free_lock_is_nobody(tmp_path):
    assert holder(tmp_path) is None
    assert holder(tmp_path / "absent") is None
    with Folder.open(tmp_path) as folder:
        fcntl.flock(folder.fd, fcntl.LOCK_SH)
        assert holder(tmp_path) == (os.getpid() if SHOWN else None)
