"""Locks: of a model directory, of a model's conversions in a cache, and of removals from a cache.

A conversion holds the lock of its model directory: shared, or exclusive if it writes into it or
removes files from it. So a run that removes sources has the model for itself, whatever cache, dtype
or path another run uses. The lock is an flock on the directory, and no file is written.

In a cache it also holds the model's lock, which saves double work. It takes that lock while it
holds the gate, a lock that a removal holds from its last check for running conversions to its last
unlink, so that no conversion starts in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError
from ..files.folder import Folder
from ..log import Logger

if TYPE_CHECKING:
    from filelock import UnixFileLock

logger = Logger(__name__)
GATE = "removal.gate"
LOCK_TIMEOUT = 3600.0  # s to wait for another run
_GATE_TIMEOUT = 30.0  # s; a conversion holds the gate only for a moment
_CONVERSION, _REMOVAL = "another conversion of this model", "a removal from the cache"
_POLL = 0.1  # s; a thread that blocks in flock could not be interrupted


@contextlib.contextmanager
def directory_lock(
    opened: Callable[[], AbstractContextManager[Folder]], *, exclusive: bool, required: bool
) -> Iterator[Folder | None]:
    """Hold the lock of a directory during a `with` block.

    Args:
        opened: Opens the directory.
        exclusive: Exclude every other holder, not only exclusive ones.
        required: Fail if the lock cannot be taken; otherwise the block runs without it.

    Yields:
        The open directory; None if it cannot be opened and the lock is not required.

    Raises:
        StoreError: A required lock cannot be taken, has no effect on this file system, or was held
            by another run for `LOCK_TIMEOUT` seconds.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(opened())
        except OSError as error:
            if required:
                raise StoreError(f"cannot be locked: {error}") from error
            yield None  # reading the directory will report the error
            return
        path = folder.path
        problem = _acquire(folder, exclusive)
        if not problem and required and not locks_exclude(folder):
            problem = "locks do nothing on this file system"
        if problem and required:
            raise StoreError(
                f"{path}: {problem}; a run that removes sources needs the model for itself: "
                "convert without --drop-source and remove them yourself"
            )
        if problem:
            logger.warning("continuing without the lock of %s: %s", path, problem)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # closing is not enough if a forked child has it
                fcntl.flock(folder.fd, fcntl.LOCK_UN)


def _acquire(folder: Folder, exclusive: bool) -> str | None:
    """Wait for the lock; return the reason if it cannot be taken."""
    from .waiting import Wait  # here and below: a run without work waits for none

    how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    until, wait = time.monotonic() + LOCK_TIMEOUT, Wait()
    while True:
        try:
            fcntl.flock(folder.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return f"another conversion of this model held its lock for {LOCK_TIMEOUT:.0f} s"
            wait.notice(_CONVERSION, folder.path)
            time.sleep(_POLL)
        except OSError as error:
            return f"it cannot be locked: {error.strerror}"
        else:
            return None


def locks_exclude(folder: Folder) -> bool:
    """Test whether locks work on a directory's file system; some grant every lock.

    Args:
        folder: The directory; it is locked for a moment if it is not locked already.

    Returns:
        Whether a second lock on it is refused.
    """
    with contextlib.suppress(OSError), Folder(_reopen(folder), folder.path) as first:
        with contextlib.suppress(BlockingIOError):  # held exclusively already
            fcntl.flock(first.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_locked(folder)
    return False


def _is_locked(folder: Folder) -> bool:
    with Folder(_reopen(folder), folder.path) as second:
        try:
            fcntl.flock(second.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _reopen(folder: Folder) -> int:
    """Open the same directory again, since an flock belongs to an open file, not to a process."""
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder.fd)


@contextlib.contextmanager
def conversion_lock(locks: Path, name: str, mode: int) -> Iterator[None]:
    """Hold the lock of a model's conversions in a cache during a `with` block.

    On a file system without locks, or after `LOCK_TIMEOUT` seconds, the block runs without it.

    Args:
        locks: The directory of the cache's locks.
        name: The name of the model's manifest.
        mode: The mode of a new lock file.
    """
    import filelock  # slow, and a run without work does not need it

    gate, lock = (
        filelock.UnixFileLock(locks / file, mode=mode, fallback_to_soft=False)
        for file in (GATE, f"{name}.lock")
    )
    try:
        _acquire_behind_gate(gate, lock)
    except (OSError, NotImplementedError, filelock.Timeout) as error:
        logger.warning("continuing without the lock %s: %s", locks / name, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _acquire_behind_gate(gate: UnixFileLock, lock: UnixFileLock) -> None:
    """Take a lock while holding the gate, which is released between the attempts."""
    import filelock

    from .waiting import Wait

    until, wait = time.monotonic() + LOCK_TIMEOUT, Wait()
    while True:
        try:
            with gate.acquire(timeout=max(0.0, min(_POLL, until - time.monotonic()))):
                lock.acquire(timeout=0)
                return
        except filelock.Timeout as error:
            if time.monotonic() > until:
                raise
            held = Path(error.lock_file)
        wait.notice(_CONVERSION if held == Path(lock.lock_file) else _REMOVAL, held)
        time.sleep(_POLL)


@contextlib.contextmanager
def removal_lock(locks: Path, mode: int) -> Iterator[None]:
    """Let no conversion start in a cache during a `with` block.

    Args:
        locks: The directory of the cache's locks.
        mode: The mode of a new lock file.

    Raises:
        StoreError: Another removal held the gate too long.
    """
    import filelock

    gate = filelock.UnixFileLock(locks / GATE, mode=mode, fallback_to_soft=False)
    try:
        gate.acquire(timeout=_GATE_TIMEOUT)
    except filelock.Timeout:
        raise StoreError(
            f"{locks / GATE}: held for {_GATE_TIMEOUT:.0f} s by another removal; wait for it"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("continuing without the lock %s: %s", locks / GATE, error)
        yield
        return
    try:
        yield
    finally:
        gate.release()
