"""Locks: of a model directory, of a model's conversions in a cache, of removals from a cache.

A conversion holds its model directory's lock: shared, or exclusive when it writes into it or
removes from it. So a run that removes sources is alone with the model, whatever cache, dtype or
spelling of the path another run has. That lock is on the directory itself, by descriptor: nothing
is written.

In a cache it also holds the model's own lock, which saves double work, and takes it while it holds
the gate. A removal holds the gate from its last look at who is converting to its last unlink, so
that none begins meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError
from ..files.folder import Folder

if TYPE_CHECKING:
    from filelock import UnixFileLock

logger = logging.getLogger(__name__)
GATE = "removal.gate"
PATIENCE = 3600.0  # s to wait for another run before going on beside it
_GATE_PATIENCE = 30.0  # s; a conversion holds the gate for a moment
_POLL = 0.1  # s; a thread that sleeps in flock could not be interrupted


@contextlib.contextmanager
def directory_lock(
    opened: Callable[[], AbstractContextManager[Folder]], *, exclusive: bool, required: bool
) -> Iterator[Folder | None]:
    """Hold the lock of a directory during the body, which gets it open.

    Args:
        opened: Opens the directory.
        exclusive: Keep every other holder out, not only exclusive ones.
        required: Fail where there is no lock to be had; else the body then runs without it.

    Raises:
        StoreError: `required`, and locks do nothing on this file system, or another run held it
            for `PATIENCE` seconds.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(opened())
        except OSError as error:
            if required:
                raise StoreError(f"cannot be locked: {error}") from error
            yield None  # what is wrong with the directory is found by whoever reads it
            return
        path = folder.path
        problem = _acquire(folder, exclusive)
        if not problem and required and not excludes(folder):
            problem = "locks do nothing on this file system"
        if problem and required:
            raise StoreError(
                f"{path}: {problem}; a run that removes sources must be alone with the model: "
                "convert without --drop-source and remove them yourself"
            )
        if problem:
            logger.warning("going on without the lock of %s: %s", path, problem)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # a child forked meanwhile has it open, too
                fcntl.flock(folder.fd, fcntl.LOCK_UN)


def _acquire(folder: Folder, exclusive: bool) -> str | None:
    """Wait for the lock; return why it was not had."""
    how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    until, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            fcntl.flock(folder.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return f"another conversion of this model held its lock for {PATIENCE:.0f} s"
            if not told:
                logger.info("waiting for another conversion of %s", folder.path)
                told = True
            time.sleep(_POLL)
        except OSError as error:
            return f"it cannot be locked: {error.strerror}"
        else:
            return None


def excludes(folder: Folder) -> bool:
    """Whether a directory whose lock is held, or taken here for a moment, is seen to be locked.

    Some network file systems grant every lock.
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
    """Open the same directory again: locks belong to an open file, not to a process."""
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder.fd)


@contextlib.contextmanager
def conversion_lock(locks: Path, name: str, mode: int) -> Iterator[None]:
    """Hold the lock of a model's conversions in a cache during the body.

    On a file system without locks, or after `PATIENCE` seconds, the body runs without it.

    Args:
        locks: The directory of the cache's locks.
        name: The name of the model's manifest.
        mode: Of a lock file that is made.
    """
    import filelock  # 9 ms, which a run without work saves

    gate, lock = (
        filelock.UnixFileLock(locks / file, mode=mode, fallback_to_soft=False)
        for file in (GATE, f"{name}.lock")
    )
    try:
        _pass(gate, lock, locks / name)
    except (OSError, NotImplementedError, filelock.Timeout) as error:
        logger.warning("going on without the lock %s: %s", locks / name, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _pass(gate: UnixFileLock, lock: UnixFileLock, name: Path) -> None:
    """Take a lock while the gate is held; raises Timeout."""
    import filelock

    until, told = time.monotonic() + PATIENCE, False
    while True:
        with gate.acquire(timeout=max(0.0, until - time.monotonic())):
            try:
                lock.acquire(timeout=0)
                return
            except filelock.Timeout:
                if time.monotonic() > until:
                    raise
        if not told:
            logger.info("waiting for another conversion, which holds %s", name)
            told = True
        time.sleep(_POLL)


@contextlib.contextmanager
def removal_lock(locks: Path, mode: int) -> Iterator[None]:
    """Let no conversion begin in a cache during the body. Raises StoreError."""
    import filelock

    gate = filelock.UnixFileLock(locks / GATE, mode=mode, fallback_to_soft=False)
    try:
        gate.acquire(timeout=_GATE_PATIENCE)
    except filelock.Timeout:
        raise StoreError(
            f"{locks / GATE}: held for {_GATE_PATIENCE:.0f} s by another removal; wait for it"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("going on without the lock %s: %s", locks / GATE, error)
        yield
        return
    try:
        yield
    finally:
        gate.release()
