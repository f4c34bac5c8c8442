"""The memo of digests: what a file's digest is, known without reading the file through.

    v1/memo/<size>-<device>-<inode>    [form, [stamp, file system, sample], digest, firm]

A memo counts only for a file whose stamp, file system and sample are what they were at the hash:
    firm        if its times show every change (see filesystems.py), and it was settled
    not firm    if the Hub's cache names the file by that digest, for no program rewrites its blobs

A file is settled when any change after the start of its hash must alter its stamp (git's racy
rule). Its stamp is then 2 s older than that start, by the clock that made it: the file system's,
which a wrong clock of the process does not touch. Where the two may be clocks of two machines,
it takes a day, or a memo of the same file that is 2 s old. A store through mmap into an already
dirty page alters no time, and only the sample may show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from ..errors import ParoquantStreamError
from .descriptor import FileStamp, file_status
from .filesystems import Ctime, ctime_kind, shows_changes
from .folder import Folder
from .hashing import SourceHasher, read_into

_FORM = 2
_MAX_MEMO = 4096  # bytes; one has 200
SAMPLES = 8  # places in a file, 20 us in all, 0.8 ms from a disk; 64 would take 0.15 and 6 ms
SAMPLE_SIZE = 4096  # bytes of each


@dataclass(frozen=True)
class Observation:
    """An open file as it was at one time."""

    stamp: FileStamp
    fsid: int
    kind: Ctime
    sample: str
    now_ns: int = 0
    """The time by the clock of the memo's file system; 0 where that is not known."""
    same_clock: bool = False
    """Whether that clock stamps the file, too."""

    @property
    def identity(self) -> list[int | str]:
        """Return stamp, file system and sample, as they stand in a memo."""
        return [*vars(self.stamp).values(), self.fsid, self.sample]

    @property
    def shows_changes(self) -> bool:
        """Return whether every change of the file but one through mmap alters its stamp."""
        return shows_changes(self.kind, self.stamp)

    @property
    def is_settled(self) -> bool:
        """Return whether that is so even for a change in the next moment."""
        return self.stamp.is_settled(self.now_ns, self.same_clock)


@dataclass(frozen=True)
class Memo:
    """Digests of files, one small JSON file each, named `<size>-<device>-<inode>`.

    Every defect is a miss, and every failure to write is ignored: a memo only saves reading.
    """

    directory: Path
    read_only: bool = False
    opened: Callable[..., AbstractContextManager[Folder]] | None = None
    """Opens the directory, `create=True` makes it; by default its path is followed."""

    def lookup(self, fd: int, name: str | None = None) -> str | None:
        """Return the digest of an open file if it is known without reading the file through.

        Args:
            fd: The file.
            name: The digest by which the Hub's cache names the file.
        """
        seen = _observe(fd)
        kept = self._read(seen) if seen else None
        if seen is None or kept is None:
            return None
        digest, firm = kept
        return digest if (firm and seen.shows_changes) or digest == name else None

    def begin(self, fd: int) -> Observation | None:
        """Return what `remember` needs from before a hash; None where nothing can be kept."""
        seen = None if self.read_only else _observe(fd)
        if seen is None:
            return None
        now_ns, kind = self._now()
        return replace(seen, now_ns=now_ns, same_clock=seen.kind is kind is Ctime.LOCAL)

    def remember(
        self, fd: int, before: Observation | None, digest: str, name: str | None = None
    ) -> None:
        """Keep the digest of an open file, if the file is still what it was before its hash.

        Args:
            fd: The file.
            before: What `begin` returned.
            digest: What the hash found.
            name: The digest by which the Hub's cache names the file.
        """
        after = _observe(fd) if before else None
        if before is None or after is None or after.identity != before.identity:
            return
        firm = before.shows_changes and (before.is_settled or self._was_known(before, digest))
        if before.shows_changes or digest == name:
            self._write(before, digest, firm)

    def remember_written(self, fd: int, stamp: FileStamp, digest: str) -> None:
        """Keep the digest of a file that this process has just written.

        Args:
            fd: The file, opened again.
            stamp: Its stamp when it was published. A later change alters it, except within one tick
                of the clock; a tick of a second is too long.
            digest: That of the bytes that were written.
        """
        seen = _observe(fd)
        if seen and seen.stamp == stamp and seen.shows_changes and not stamp.in_whole_seconds:
            self._write(seen, digest, firm=True)

    def knows_size(self, size: int) -> bool:
        """Return whether a file of this size was ever hashed: hashing first may save work."""
        with contextlib.suppress(OSError, ParoquantStreamError), self._folder() as folder:
            return any(name.startswith(f"{size}-") for name in folder.names())
        return False

    def path(self, stamp: FileStamp) -> Path:
        """Return where the digest of the file with this stamp lies or would lie."""
        return self.directory / _name(stamp)

    @contextlib.contextmanager
    def _folder(self, create: bool = False) -> Iterator[Folder]:
        """Open the directory. Raises OSError, StoreError."""
        if self.opened:
            with self.opened(create=create) as folder:
                yield folder
            return
        if create:
            with contextlib.suppress(FileExistsError):
                self.directory.mkdir(mode=0o700)
        with Folder.open(self.directory) as folder:
            yield folder

    def _read(self, seen: Observation) -> tuple[str, bool] | None:
        """Return the digest of the very same file, and whether it is firm."""
        try:
            with self._folder() as folder:
                fd = folder.open_file(_name(seen.stamp))
            with open(fd, "rb") as file:
                form, identity, digest, firm = json.loads(file.read(_MAX_MEMO))
        except (OSError, ParoquantStreamError, ValueError, TypeError):
            return None
        sound = form == _FORM and isinstance(digest, str) and len(digest) in (32, 64)
        return (digest, firm is True) if sound and identity == seen.identity else None

    def _was_known(self, seen: Observation, digest: str) -> bool:
        """Return whether the very same file had this digest well before its hash began."""
        kept = self._read(seen)
        if kept is None or kept[0] != digest:
            return False
        with contextlib.suppress(OSError, ParoquantStreamError), self._folder() as folder:
            written = FileStamp.of(folder.stat(_name(seen.stamp)))
            return kept[1] or written.is_settled(seen.now_ns, same_clock=True)
        return False

    def _write(self, seen: Observation, digest: str, firm: bool) -> None:
        if self.read_only:
            return
        name = _name(seen.stamp)
        temp = f".{name}.{os.getpid()}.{time.monotonic_ns()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with (
            contextlib.suppress(OSError, ParoquantStreamError),
            self._folder(create=True) as folder,
        ):
            try:
                with open(os.open(temp, flags, 0o600, dir_fd=folder.fd), "wb") as file:
                    file.write(json.dumps([_FORM, seen.identity, digest, firm]).encode())
                folder.replace(temp, folder, name)
            except OSError:
                folder.unlink(temp)

    def _now(self) -> tuple[int, Ctime]:
        """Return the time by the clock of the memo's file system, and what that one is worth."""
        try:
            # a tree that was cloned lacks its empty directories
            with self._folder(create=True) as folder:
                os.utime(folder.fd)  # it has the kernel's or the server's time then, not ours
                stamp, fsid = FileStamp.of(folder.status()), os.fstatvfs(folder.fd).f_fsid
                kind = ctime_kind(folder.fd, stamp.device, fsid)
        except (OSError, ParoquantStreamError):
            return 0, Ctime.NONE
        return min(time.time_ns(), stamp.mtime_ns, stamp.ctime_ns), kind


def _name(stamp: FileStamp) -> str:
    return f"{stamp.size}-{stamp.device:x}-{stamp.inode:x}"


def hash_file(fd: int, label: str, memo: Memo, name: str | None = None) -> str:
    """Return the SHA-256 of an open file, and remember it.

    Args:
        fd: The file.
        label: What errors call it.
        memo: Where the digest is kept.
        name: The digest by which the Hub's cache names the file.

    Raises:
        SourceChangedError: The file became shorter meanwhile.
        UnreadableFileError: The system cannot read it.
    """
    before, size = memo.begin(fd), file_status(fd, label).st_size
    sha256 = SourceHasher(fd, (), size, label, lambda _: None).finish().sha256
    memo.remember(fd, before, sha256, name)
    return sha256


def _observe(fd: int) -> Observation | None:
    """Return what an open file is like; None when the system does not say it."""
    try:
        stamp, fsid = FileStamp.of(os.fstat(fd)), os.fstatvfs(fd).f_fsid
        kind, sample = ctime_kind(fd, stamp.device, fsid), _sample(fd, stamp.size)
    except (OSError, ParoquantStreamError):
        return None
    return Observation(stamp, fsid, kind, sample)


def _sample(fd: int, size: int) -> str:
    """Return the XXH3-128 of a few pages: the first, the last, and some at even distances.

    Raises:
        SourceChangedError: The file became shorter meanwhile.
        UnreadableFileError: The system cannot read it.
    """
    count = min(SAMPLE_SIZE, size)
    pages = memoryview(bytearray(SAMPLES * count))
    for index in range(SAMPLES):
        start = (size - count) * index // (SAMPLES - 1)
        read_into(fd, pages[index * count : (index + 1) * count], start, "a sample")
    return xxhash.xxh3_128_hexdigest(pages)
