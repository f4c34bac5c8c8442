"""Whether a conversion is running in a store, and may be about to name unclaimed entries.

A conversion holds its model's lock from before its first entry to after its manifest, and while it
writes an entry its temporary file grows. Removal checks this before every entry. Where locks do
nothing, a conversion between two entries is not visible; `Store.locks_work` detects that, and then
unclaimed entries stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import StoreError
from ..files import temp_files
from ..store.lock import locks_exclude
from ..store.store import Store

QUIET = 3600.0  # s without a change after which a live process's temp is no work: a writer's grows
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def running(store: Store) -> str | None:
    """Tell by what a conversion is seen to run in the store; None when none is."""
    for path in _files(store.folder("locks")):
        if path.suffix == ".lock" and _is_held(path):
            return f"{path} is held"
    in_place = any(name.startswith("model-") for name in store.manifest_names())
    if in_place and _is_held(store.root.parent):
        return f"{store.root.parent} is locked"
    with contextlib.suppress(OSError), store.opened("tmp") as tmp:
        locks = locks_exclude(tmp)
        for name, status in tmp.files():
            age = time.time() - max(status.st_mtime, status.st_ctime)
            young = age < QUIET and not temp_files.is_dead(tmp, name, locks)
            if young or temp_files.is_held(tmp, name):
                return f"{tmp.path / name} is being written"
    return None


def demand_quiet(store: Store) -> None:
    """Raise StoreError when a conversion is running in the store."""
    if reason := running(store):
        raise StoreError(
            f"a conversion is running ({reason}); wait for it or stop it, and run this again"
        )


def _files(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(Path(entry.path) for entry in os.scandir(directory))


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
