"""Whether a conversion is running in a store, and may be about to name what nobody names yet.

A conversion holds its model's lock from before its first entry to after its manifest, and while it
writes an entry a temp of it grows. Removal asks before every entry. Where locks do nothing, a
conversion between two entries cannot be seen; `locks_work` tells, and then what is unclaimed stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import StoreError
from ..store import Store, is_dead

QUIET = 3600.0  # s without a change after which a live process's temp is no work: a writer's grows
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def running(store: Store) -> str | None:
    """What shows that a conversion is running in the store, for people; None when nothing does."""
    for path in _files(store.folder("locks")):
        if path.suffix == ".lock" and _is_held(path):
            return f"{path} is held"
    for path in _files(store.folder("tmp")):
        with contextlib.suppress(OSError):
            age = time.time() - _changed(path)
            if age < QUIET and not is_dead(path.name, age):
                return f"{path} is being written"
    return None


def demand_quiet(store: Store) -> None:
    """Raises StoreError when a conversion is running in the store."""
    if reason := running(store):
        raise StoreError(
            f"a conversion is running ({reason}); wait for it or stop it, and run this again"
        )


def locks_work(store: Store) -> bool:
    """Whether a lock that is held is seen to be held, on the store's file system."""
    directory = store.folder("locks")  # a directory can be locked too: nothing is written
    try:
        fd = os.open(directory, _OPEN)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_held(directory)
    except BlockingIOError:  # another process is asking
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _files(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(Path(entry.path) for entry in os.scandir(directory))


def _changed(path: Path) -> float:
    status = os.stat(path, follow_symlinks=False)
    return max(status.st_mtime, status.st_ctime)


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, _OPEN)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two may ask at once
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
