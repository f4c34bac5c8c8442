"""Files found in a directory: what `lstat` says, no link followed, none opened."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files.descriptor import FileStamp


@dataclass(frozen=True)
class Found:
    """A regular file."""

    path: Path
    size: int
    mtime_ns: int
    changed: float
    """The later of mtime and ctime, seconds: no copy and no `touch` makes a file look older."""
    stamp: FileStamp


def regular_files(directory: Path) -> Iterator[Found]:
    """List the regular files in a directory by name; an absent directory has none."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            with contextlib.suppress(OSError):  # removed meanwhile
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield _found(Path(entry.path), status)


def _found(path: Path, status: os.stat_result) -> Found:
    changed = max(status.st_mtime, status.st_ctime)
    return Found(path, status.st_size, status.st_mtime_ns, changed, FileStamp.of(status))
