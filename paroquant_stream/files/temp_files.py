"""Temp files: their names, and whether the run that writes one is still alive.

    <machine>-<boot>-<pid namespace>-<pid>-<random>      8 hex, 8 hex, decimal, decimal, 32 hex

A writer holds a lock on its temp for as long as it is open, so that a sweep in another container,
which sees other process numbers, sees the lock. Where locks do nothing the name tells: the process
of this system by its number, the run of another one by its lease, the temp's mtime, which is
renewed every `RENEW` seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import MalformedFileError
from .descriptor import closing
from .folder import Folder

LEASE = 24 * 3600.0  # s without renewal after which a temp of another machine counts as dead
RENEW = 600.0  # s between renewals
GRACE = 60.0  # s in which a temp may be made and not locked yet
_TRIES = 1000
_NAME = re.compile(
    r"(?P<machine>[0-9a-f]{8})-(?P<boot>[0-9a-f]{8})-(?P<space>\d+)-(?P<pid>\d+)-[0-9a-f]{32}$"
)
_OLD = re.compile(r"[0-9a-f]{8}-\d+-[0-9a-f]{32}")  # of earlier versions
_open: dict[str, int] = {}
"""The temps that this process writes, and their descriptors."""
_renewer = threading.Lock()


def temp_name() -> str:
    """A name that no other run, process or machine uses, and by which `is_dead` can judge."""
    here = _here()
    random = os.urandom(16).hex()
    return f"{here.machine}-{here.boot}-{here.space}-{os.getpid()}-{random}"


def is_temp(name: str) -> bool:
    """Whether a file's name has the form of `temp_name`."""
    return bool(_NAME.fullmatch(name) or _OLD.fullmatch(name))


def is_own(name: str) -> bool:
    """Whether this process gave a temp its name."""
    here = _here()
    return name.startswith(f"{here.machine}-{here.boot}-{here.space}-{os.getpid()}-")


def is_open(name: str) -> bool:
    """Whether this process is writing the temp of this name, by whatever path."""
    return name in _open


def announce(name: str) -> None:
    """Note that this process is about to make a temp, so that no sweep of its own removes it."""
    _open[name] = -1


def hold(name: str, fd: int) -> None:
    """Lock a temp that was just made, and renew its lease, until `release`."""
    _open[name] = fd
    _lock(fd)
    if _renewer.acquire(blocking=False):  # the first one starts it, for the life of the process
        threading.Thread(target=_renew_leases, name="leases", daemon=True).start()


def _lock(fd: int) -> None:
    for _ in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweep looks at it, and lets go at once
            time.sleep(0.001)
        except OSError:  # without locks the name and the lease tell
            return
        else:
            return


def release(name: str) -> None:
    """Note that a temp is published or given up; its lock goes when its descriptor is closed."""
    _open.pop(name, None)


def _renew_leases() -> None:
    while True:
        time.sleep(RENEW)
        for fd in list(_open.values()):
            with contextlib.suppress(OSError):  # closed meanwhile
                os.utime(fd)


def is_dead(folder: Folder, name: str, locks: bool) -> bool:
    """Whether the writer of the temp `name` is gone; a temp that is not there is not dead.

    Args:
        folder: Where it lies.
        name: Its name, which ends with what `temp_name` gave.
        locks: Whether locks are known to work on this file system.

    Raises:
        OSError: It cannot be looked at.
    """
    try:
        fd = folder.open_file(name)
    except (FileNotFoundError, MalformedFileError):
        return False
    with closing(fd):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two sweeps may ask at once
        except BlockingIOError:
            return False
        except OSError:
            locks = False
        return _is_gone(name, os.fstat(fd).st_mtime, locks)


def sweep(folder: Folder, locks: bool, own: bool) -> int:
    """Remove the temps of dead runs and those that this process could not remove before.

    Args:
        folder: Where temps lie; other files in it stay.
        locks: Whether locks are known to work on its file system.
        own: Remove also those that this process is still writing.

    Returns:
        The bytes freed.

    Raises:
        OSError: The directory cannot be read.
    """
    freed = 0
    for name, status in folder.files():
        with contextlib.suppress(OSError):
            mine = is_own(name) and (own or not is_open(name))
            if mine or (is_temp(name) and is_dead(folder, name, locks)):
                folder.unlink(name)
                freed += status.st_size
    return freed


def name_beside(target: str) -> str:
    """Return the name of a temp beside a file, hidden, by which `sweep_beside` finds it."""
    return f".{target}.{temp_name()}"


def sweep_beside(folder: Folder, target: str, locks: bool) -> None:
    """Remove the temps that killed runs left beside a file.

    Args:
        folder: Where the file lies or will lie.
        target: Its name.
        locks: Whether locks are known to work on its file system.

    Raises:
        OSError: The directory cannot be read or written.
    """
    prefix = f".{target}."
    for name, _ in folder.files():
        temp = name.removeprefix(prefix)
        if temp != name and is_temp(temp) and is_dead(folder, name, locks):
            folder.unlink(name)


def is_held(folder: Folder, name: str) -> bool:
    """Whether a writer holds the lock of a temp. Raises OSError."""
    try:
        fd = folder.open_file(name)
    except (FileNotFoundError, MalformedFileError):
        return False
    with closing(fd):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _is_gone(name: str, renewed: float, locks: bool) -> bool:
    """Whether the writer of a temp that nobody has locked is gone."""
    here, writer, age = _here(), _NAME.search(name), time.time() - renewed
    if writer is None:
        return age > LEASE
    if writer["boot"] != here.boot:
        restarted = writer["machine"] == here.machine and renewed < here.booted
        return restarted or age > LEASE
    same_space = int(writer["space"]) == here.space
    if locks:
        return age > GRACE or (same_space and not _is_running(int(writer["pid"])))
    return not _is_running(int(writer["pid"])) if same_space else age > LEASE


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        return True
    return True


@dataclass(frozen=True)
class _Here:
    """What tells this system's processes from others'."""

    machine: str
    boot: str
    space: int
    """The inode of the namespace of process numbers; 0 where there is only one."""
    booted: float
    """When the system was started, seconds since 1970; 0 where that cannot be told."""


@cache
def _here() -> _Here:
    machine = os.uname().nodename.encode() + b"\0" + _read("/etc/machine-id")
    boot = _read("/proc/sys/kernel/random/boot_id")  # one for all containers of a system
    space, clock = 0, getattr(time, "CLOCK_BOOTTIME", None)
    with contextlib.suppress(OSError):
        space = os.stat("/proc/self/ns/pid").st_ino
    booted = time.time() - time.clock_gettime(clock) if clock is not None else 0.0
    return _Here(_short(machine), _short(boot), space, booted)


def _read(path: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(path).read_bytes()
    return b""


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _forget_in_child() -> None:
    """In a forked child: the temps are the parent's, and its thread is not here."""
    global _renewer  # noqa: PLW0603 (a lock cannot be made free from outside)
    _open.clear()
    _here.cache_clear()
    _renewer = threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
