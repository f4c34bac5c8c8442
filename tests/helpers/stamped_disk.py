"""A file system of a test with rules of its own for the times of a file, and its digest cache."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import DigestCache, hash_file
from paroquant_stream.files.filesystems import Ctime
from tests.helpers.builders import flip

DATA = bytes(range(256)) * 1000
SECOND, DAY, YEAR = 10**9, 86_400 * 10**9, 365 * 86_400 * 10**9  # ns
HOUR = 3600  # s


@dataclass
class Disk:
    """How a file system stamps its files."""

    kind: Ctime = Ctime.LOCAL
    mirrors: bool = False
    """Whether the ctime is a copy of the mtime."""
    tick: int = 1
    """Resolution of its times, in ns."""
    behind: int = 0
    """How far its clock is behind, in ns."""
    others: Disk | None = None
    """The rules for all other files."""

    def stamp(self, status: os.stat_result) -> FileStamp:
        mtime, ctime = status.st_mtime_ns, status.st_ctime_ns
        times = [t - self.behind for t in (mtime, mtime if self.mirrors else ctime)]
        times = [t - t % self.tick for t in times]
        return FileStamp(status.st_dev, status.st_ino, status.st_size, *times)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_now(cache: DigestCache, path: Path, name: str | None = None) -> str:
    """Hash a file and store its digest."""
    with path.open("rb") as file:
        return hash_file(file.fileno(), "x", cache, name)


def look_up(cache: DigestCache, path: Path, name: str | None = None) -> str | None:
    """Return the stored digest of a file."""
    with path.open("rb") as file:
        return cache.lookup(file.fileno(), name)


def rewrite(path: Path, at: int, keep_times: bool = True) -> None:
    """Change one byte in place, and restore the mtime if `keep_times`."""
    before = path.stat()
    flip(path, at)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
