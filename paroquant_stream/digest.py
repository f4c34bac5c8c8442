"""Identities of bytes: SHA-256 of sources and parts, XXH3-128 of entries, and the memo that saves
both.

SHA-256 is the Hub's own identity of a shard. XXH3 detects damage, not malice, at a tenth of the
cost. A memo trusts `stat`, so it is made only for a file that was left alone for `RACY_SECONDS`
before its hash began (git's racy rule); a store through mmap into an already dirty page escapes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import xxhash

from .descriptor import file_status, unreadable
from .errors import SourceChanged
from .tensorfile import TensorInfo

CHUNK = 4 << 20  # bytes a read; larger ones leave the L2 cache before they are hashed
RACY_SECONDS = 2.0  # the coarsest file system clock in use (FAT, some NFS) ticks every 2 s


@dataclass(frozen=True)
class FileStamp:
    """What `stat` says of a file's content: unequal stamps, perhaps unequal bytes."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """The stamp in a `stat` result."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    @classmethod
    def of_fd(cls, fd: int, label: str) -> FileStamp:
        """The stamp of an open file. Raises UnreadableFile."""
        return cls.of(file_status(fd, label))

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after `now_ns` must show in the stamp."""
        return max(self.mtime_ns, self.ctime_ns) + RACY_SECONDS * 1e9 <= now_ns


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


def read_into(fd: int, view: memoryview, start: int, label: str) -> None:
    """Fills `view` with the bytes from `start` on.

    Raises SourceChanged when the file ends before, UnreadableFile when the system cannot read it.
    """
    filled = 0
    while filled < len(view):
        try:
            count = os.preadv(fd, [view[filled:]], start + filled)
        except OSError as error:
            raise unreadable(label, error) from error
        if not count:
            raise SourceChanged(f"{label}: became shorter while it was read; convert it again")
        filled += count


def read_chunks(
    fd: int, start: int, stop: int, label: str, buffer: memoryview
) -> Iterator[memoryview]:
    """The bytes `start:stop` in order, each chunk a view into `buffer`, which the next one reuses.

    Raises SourceChanged when the file ends before `stop`.
    """
    while start < stop:
        chunk = buffer[: min(len(buffer), stop - start)]
        read_into(fd, chunk, start, label)
        yield chunk
        start += len(chunk)


@dataclass(frozen=True)
class SourceDigest:
    """What one pass over a shard found."""

    sha256: str
    fingerprints: dict[str, bytes]
    """XXH3-128 of each tensor's bytes, to prove later that those same bytes were converted."""


class SourceHasher:
    """Hashes a file front to back: the bytes it is given as they are read, and the gaps between."""

    def __init__(
        self,
        fd: int,
        tensors: Sequence[TensorInfo],
        size: int,
        label: str,
        tick: Callable[[int], None],
    ) -> None:
        """`tensors` in file order; `tick(bytes)` follows every chunk and may raise to stop."""
        self._fd, self._size, self._label, self._tick = fd, size, label, tick
        self._whole, self._one = hashlib.sha256(), xxhash.xxh3_128()
        self._left = deque(tensor for tensor in tensors if tensor.stop > tensor.start)
        self._fingerprints = {t.name: self._one.digest() for t in tensors if t.stop == t.start}
        self.position = 0

    def update(self, view: memoryview) -> None:
        """Hashes the bytes from `position` on."""
        self._whole.update(view)
        while view:
            if not self._left:
                self.position += len(view)
                return
            tensor = self._left[0]
            inside = self.position >= tensor.start
            chunk = view[: (tensor.stop if inside else tensor.start) - self.position]
            if inside:
                self._one.update(chunk)
            self.position += len(chunk)
            view = view[len(chunk) :]
            if self.position == tensor.stop:
                self._fingerprints[tensor.name] = self._one.digest()
                self._one.reset()
                self._left.popleft()

    def advance(self, stop: int) -> None:
        """Reads and hashes up to `stop`. Raises SourceChanged when the file ends before."""
        if stop <= self.position:
            return
        buffer = memoryview(bytearray(min(CHUNK, stop - self.position)))
        for chunk in read_chunks(self._fd, self.position, stop, self._label, buffer):
            self.update(chunk)
            self._tick(len(chunk))

    def finish(self) -> SourceDigest:
        """The digest, once the rest of the file is read."""
        self.advance(self._size)
        return SourceDigest(self._whole.hexdigest(), self._fingerprints)


def hash_file(fd: int, label: str, memo: Memo) -> str:
    """SHA-256 of the file at `fd`, remembered if the file was left alone long enough."""
    started, stamp = time.time_ns(), FileStamp.of_fd(fd, label)
    sha256 = SourceHasher(fd, (), stamp.size, label, lambda _: None).finish().sha256
    if stamp.is_settled(started) and FileStamp.of_fd(fd, label) == stamp:
        memo.remember(stamp, sha256)
    return sha256


def sha256_of(data: memoryview) -> bytes:
    """SHA-256 of a part that another shard's task borrows, 32 bytes."""
    return hashlib.sha256(data).digest()


def hash_entry(fd: int, label: str) -> str:
    """XXH3-128 of a whole file, in hex."""
    return hash_parts(b"", fd, label)


def hash_parts(head: bytes, fd: int, label: str) -> str:
    """XXH3-128 of `head` and of what follows as many bytes in the file, in hex."""
    digest = xxhash.xxh3_128(head)
    buffer = memoryview(bytearray(CHUNK))
    for chunk in read_chunks(fd, len(head), file_status(fd, label).st_size, label, buffer):
        digest.update(chunk)
    return digest.hexdigest()
