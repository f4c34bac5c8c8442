"""Temp files: their names, and how a leftover is told from one that is being written.

    <machine>-<boot>-<pid namespace>-<pid>-<random>      8 hex, 8 hex, decimal, decimal, 32 hex

A writer holds a lock on its temp file while it is open; a sweep in another container, which sees
other process ids, sees the lock. Where locks do not work, the name decides: a writer on this system
is looked up by its process id, one on another system must renew its lease, the mtime of the temp
file, every `RENEW` seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..errors import MalformedFileError
from .descriptor import closing
from .folder import Folder

LEASE = 24 * 3600.0  # s without renewal after which another machine's temp file is a leftover
RENEW = 600.0  # s between renewals
GRACE = 60.0  # s between creating and locking a temp file, at most
_TRIES = 1000  # to get the lock, 1 ms apart
# patterns as text: most runs meet no leftover, and need neither
_NAME = r"(?P<machine>[0-9a-f]{8})-(?P<boot>[0-9a-f]{8})-(?P<space>\d+)-(?P<pid>\d+)-[0-9a-f]{32}$"
_OLD_NAME = r"[0-9a-f]{8}-\d+-[0-9a-f]{32}"  # of earlier versions
_open: dict[str, int] = {}
"""Temp files that this process is writing, with their descriptors; -1 before they are created."""
_renewer = threading.Lock()
"""Held for good once this process has started its thread that renews leases."""


def temp_name() -> str:
    """Return a new name that identifies the machine, boot and process of its writer."""
    system = _this_system()
    random = os.urandom(16).hex()
    return f"{system.machine}-{system.boot}-{system.space}-{os.getpid()}-{random}"


def is_temp(name: str) -> bool:
    """Return whether a name has the form of `temp_name`, also that of earlier versions."""
    return bool(re.fullmatch(_NAME, name) or re.fullmatch(_OLD_NAME, name))


def is_own(name: str) -> bool:
    """Return whether a name was made by this process."""
    system = _this_system()
    return name.startswith(f"{system.machine}-{system.boot}-{system.space}-{os.getpid()}-")


def is_open(name: str) -> bool:
    """Return whether this process is writing a temp file of this name."""
    return name in _open


def announce(name: str) -> None:
    """Register a temp file before it is created, so that no sweep in this process removes it."""
    _open[name] = -1


def hold(name: str, fd: int) -> None:
    """Lock a new temp file and renew its lease until `release`.

    Args:
        name: Its name.
        fd: Its descriptor.
    """
    _open[name] = fd
    _lock(fd)
    if _renewer.acquire(blocking=False):  # the first call starts the thread
        try:
            threading.Thread(target=_renew_leases, name="leases", daemon=True).start()
        except RuntimeError:  # no more threads here: the next call tries again
            _renewer.release()


def _lock(fd: int) -> None:
    """Lock a temp file exclusively, where the file system supports locks."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweep is testing the lock
            time.sleep(0.001)
        except OSError:  # no locks here: name and lease are enough
            return
        else:
            return


def release(name: str) -> None:
    """Unregister a temp file that was published or discarded; closing it releases its lock."""
    _open.pop(name, None)


def _renew_leases() -> None:
    """Set the mtime of the open temp files to now, forever."""
    while True:
        time.sleep(RENEW)
        for fd in list(_open.values()):
            with contextlib.suppress(OSError):  # closed meanwhile
                os.utime(fd)


def is_dead(folder: Folder, name: str, locks: bool) -> bool:
    """Return whether a temp file is a leftover of a writer that has ended; False if it is absent.

    Args:
        folder: Its directory.
        name: Its name, which ends with a name from `temp_name`.
        locks: Whether locks are known to work on this file system.

    Raises:
        OSError: The file cannot be opened.
    """
    try:
        fd = folder.open_file(name)
    except (FileNotFoundError, MalformedFileError):
        return False
    with closing(fd):
        try:
            fcntl.flock(
                fd, fcntl.LOCK_SH | fcntl.LOCK_NB
            )  # shared, so that two sweeps can test at once
        except BlockingIOError:
            return False
        except OSError:
            locks = False
        return _has_ended(name, os.fstat(fd).st_mtime, locks)


def sweep(folder: Folder, locks: bool, own: bool) -> int:
    """Remove leftover temp files, including those that this process could not remove before.

    Args:
        folder: Directory of temp files; other files in it are kept.
        locks: Whether locks are known to work on its file system.
        own: Whether to remove also the temp files that this process is writing.

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
    """Return whether a writer holds the lock of a temp file.

    Raises:
        OSError: The file cannot be opened, or locks do not work here.
    """
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


def _has_ended(name: str, renewed: float, locks: bool) -> bool:
    """Return whether the writer of an unlocked temp file, last renewed at a time, has ended."""
    system, writer, age = _this_system(), re.search(_NAME, name), time.time() - renewed
    if writer is None:
        return age > LEASE
    if writer["boot"] != system.boot:
        restarted = writer["machine"] == system.machine and renewed < system.booted
        return restarted or age > LEASE
    same_space = int(writer["space"]) == system.space
    if locks:
        return age > GRACE or (same_space and not _is_running(int(writer["pid"])))
    return not _is_running(int(writer["pid"])) if same_space else age > LEASE


def _is_running(pid: int) -> bool:
    """Return whether a process of this pid namespace is running."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        return True
    return True


class _System(NamedTuple):  # a dataclass takes three times as long to import
    """What identifies this system in the name of a temp file."""

    machine: str
    """Hash of host name and machine id."""
    boot: str
    """Hash of the kernel's boot id, which all containers of a machine share."""
    space: int
    """Inode of the pid namespace; 0 on systems without namespaces."""
    booted: float
    """Time of the boot, seconds since 1970; 0 if unknown."""


@cache
def _this_system() -> _System:
    """Return the identity of this system, read once per process."""
    machine = os.uname().nodename.encode() + b"\0" + _read("/etc/machine-id")
    space, clock = 0, getattr(time, "CLOCK_BOOTTIME", None)
    if sys.platform == "darwin":
        boot = _sysctl("kern.bootsessionuuid")
        booted = float(int.from_bytes(_sysctl("kern.boottime")[:8], sys.byteorder))
    else:
        boot = _read("/proc/sys/kernel/random/boot_id")
        booted = time.time() - time.clock_gettime(clock) if clock is not None else 0.0
    with contextlib.suppress(OSError):
        space = os.stat("/proc/self/ns/pid").st_ino
    return _System(_short(machine), _short(boot or machine), space, booted)


def _sysctl(name: str) -> bytes:
    """Return a value of macOS's kernel, see sysctlbyname(3) and <sys/sysctl.h>; empty if unknown.

    `kern.boottime` is a `struct timeval`, whose first 8 bytes are seconds since 1970.
    """
    import ctypes  # slow to import, and needed on macOS only

    value, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(size), None, 0)
    return b"" if failed else value.raw[: size.value]


def _read(path: str) -> bytes:
    """Return the content of a file, empty if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(path).read_bytes()
    return b""


def _short(data: bytes) -> str:
    """Return the first 8 hex digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:8]


def _reset_in_child() -> None:
    """Forget the parent's temp files and thread in a forked child."""
    global _renewer  # noqa: PLW0603 (another thread may have held the lock)
    _open.clear()
    _this_system.cache_clear()
    _renewer = threading.Lock()


os.register_at_fork(after_in_child=_reset_in_child)
