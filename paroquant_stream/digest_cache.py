"""The memo of digests: what a file's digest is, known without reading the file through.

A memo trusts `stat`, so it is made only for a file that was left alone for `RACY_SECONDS` before
its hash began (git's racy rule); a store through mmap into an already dirty page escapes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from .descriptor import FileStamp
from .hashing import SourceHasher


@dataclass(frozen=True)
class Memo:
    """Digests remembered by stamp, one small JSON file each, named `<size>-<device>-<inode>`.

    Every defect is a miss, and every failure to write is ignored: a memo only saves reading.
    """

    directory: Path
    read_only: bool = False

    def lookup(self, stamp: FileStamp) -> str | None:
        """The digest of the file with this stamp, if it is known."""
        try:
            found, digest = json.loads(self.path(stamp).read_bytes())
        except (OSError, ValueError, TypeError):
            return None
        known = (
            found == list(astuple(stamp)) and isinstance(digest, str) and len(digest) in (32, 64)
        )
        return digest if known else None

    def remember(self, stamp: FileStamp, digest: str) -> None:
        """Keeps `digest` for the file with this stamp."""
        if self.read_only:
            return
        path = self.path(stamp)
        temp = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(json.dumps([astuple(stamp), digest]).encode())
            os.replace(temp, path)
        except OSError:
            with contextlib.suppress(OSError):
                temp.unlink()

    def knows_size(self, size: int) -> bool:
        """Whether a file of this size was ever hashed: hashing first may save a conversion."""
        with contextlib.suppress(OSError):
            return any(self.directory.glob(f"{size}-*"))
        return False

    def path(self, stamp: FileStamp) -> Path:
        """Where the digest of the file with this stamp lies or would lie."""
        return self.directory / f"{stamp.size}-{stamp.device:x}-{stamp.inode:x}"


def hash_file(fd: int, label: str, memo: Memo) -> str:
    """SHA-256 of the file at `fd`, remembered if the file was left alone long enough."""
    started, stamp = time.time_ns(), FileStamp.of_fd(fd, label)
    sha256 = SourceHasher(fd, (), stamp.size, label, lambda _: None).finish().sha256
    if stamp.is_settled(started) and FileStamp.of_fd(fd, label) == stamp:
        memo.remember(stamp, sha256)
    return sha256
