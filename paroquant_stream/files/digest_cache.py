"""A cache of file digests, so that a file that has not changed need not be read again.

    v1/memo/<size>-<device>-<inode>    [version, [stamp, file system, sample], digest, trusted]

A record counts only while the file's stamp, file system and sample are those of the time when it
was hashed, and
    if trusted        the file's times show every change (see filesystems.py), and it was settled
    if not trusted    the Hub's cache has the digest as the file's name; no program rewrites blobs

A file is settled when every change after the start of its hash must alter its stamp ("racy git"):
the stamp is then ten ticks of the kernel's clock older than that start, by the clock of the file
system, so that a wrong clock of this process has no effect. Where the stamp and the start may be
from the clocks of two machines, the stamp must be a day older, or an equal record at least 2 s
older. A write through mmap to a page
that is already dirty alters no time; only the sample can show it.
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
from . import descriptor
from .descriptor import FileStamp, file_status
from .filesystems import Ctime, ctime_kind, shows_changes
from .folder import Folder
from .hashing import SourceHasher, read_into

_VERSION = 2
_MAX_RECORD = 4096  # bytes, many times the size of a record
_MAX_EQUAL = 200  # records of one size that are read to compare samples, 10 ms
SAMPLES = 8  # pages of a file that are compared; more would delay a run without work
SAMPLE_SIZE = 4096  # bytes of each


@dataclass(frozen=True)
class Observation:
    """The state of an open file at one time."""

    stamp: FileStamp
    fsid: int
    """`f_fsid` of its file system."""
    kind: Ctime
    sample: str
    """XXH3-128 of some of its pages, in hex."""
    now_ns: int = 0
    """The time by the clock of the cache's file system; 0 if unknown."""
    same_clock: bool = False
    """Whether that clock also stamps the file."""

    @property
    def identity(self) -> list[int | str]:
        """Return stamp, file system and sample, as stored in a record."""
        return [*vars(self.stamp).values(), self.fsid, self.sample]

    @property
    def shows_changes(self) -> bool:
        """Return whether every change of the file alters its stamp, except writes through mmap."""
        return shows_changes(self.kind, self.stamp)

    @property
    def is_settled(self) -> bool:
        """Return whether even a change right after `now_ns` must alter the stamp."""
        margin = descriptor.TICK_SECONDS if self.same_clock else descriptor.WIDE_SECONDS
        return self.stamp.is_settled(self.now_ns, margin)


@dataclass(frozen=True)
class DigestCache:
    """Digests of files, one small JSON file per digest.

    A record that cannot be read is ignored, and so is an error while writing one.
    """

    directory: Path
    read_only: bool = False
    opener: Callable[..., AbstractContextManager[Folder]] | None = None
    """Opens the directory; `create=True` makes it. By default it is opened by its path."""

    def lookup(self, fd: int, name: str | None = None) -> str | None:
        """Return the digest of an open file, or None if it must be hashed.

        Args:
            fd: The file.
            name: The file's digest by its name in the Hub's cache, if it has one.
        """
        seen = _observe(fd)
        record = self._read(seen) if seen else None
        if seen is None or record is None:
            return None
        digest, trusted = record
        return digest if (trusted and seen.shows_changes) or digest == name else None

    def begin(self, fd: int) -> Observation | None:
        """Return the state of a file that is about to be hashed, for `remember`.

        Returns:
            The state, or None if no digest can be stored.
        """
        seen = None if self.read_only else _observe(fd)
        if seen is None:
            return None
        now_ns, kind = self._now()
        return replace(seen, now_ns=now_ns, same_clock=seen.kind is kind is Ctime.LOCAL)

    def remember(
        self, fd: int, before: Observation | None, digest: str, name: str | None = None
    ) -> None:
        """Store the digest of an open file unless the file has changed since `begin`.

        Args:
            fd: The file.
            before: The result of `begin`.
            digest: The result of the hash.
            name: The file's digest by its name in the Hub's cache, if it has one.
        """
        after = _observe(fd) if before else None
        if before is None or after is None or after.identity != before.identity:
            return
        trusted = before.shows_changes and (before.is_settled or self._was_known(before, digest))
        if before.shows_changes or digest == name:
            self._write(before, digest, trusted)

    def remember_written(self, fd: int, stamp: FileStamp, digest: str) -> None:
        """Store the digest of a file that this process has just written.

        Args:
            fd: The file, opened again.
            stamp: Its stamp when it was published. Any later change alters it, unless it happens
                within one tick of the clock; a clock in whole seconds is too coarse for that.
            digest: The digest of the bytes that were written.
        """
        seen = _observe(fd)
        if seen and seen.stamp == stamp and seen.shows_changes and not stamp.in_whole_seconds:
            self._write(seen, digest, trusted=True)

    def forget(self, stamp: FileStamp) -> None:
        """Remove the digest of the file with a stamp, so that it is hashed again."""
        with contextlib.suppress(OSError, ParoquantStreamError), self._open_folder() as folder:
            if not self.read_only:
                folder.unlink(_name(stamp))

    def knows_size(self, size: int) -> bool:
        """Return whether there is a digest of any file of this size in bytes."""
        with contextlib.suppress(OSError, ParoquantStreamError), self._open_folder() as folder:
            return any(name.startswith(f"{size}-") for name in folder.names())
        return False

    def may_know(self, fd: int, digest: str | None = None) -> bool:
        """Tell whether a file with the bytes of this one may have been hashed before.

        Args:
            fd: The file.
            digest: One that a file of its size and place had; unless it is remembered, with the
                sample that went with it, the file may still have it.
        """
        seen = _observe(fd)
        if seen is None:
            return digest is not None
        with contextlib.suppress(OSError, ParoquantStreamError), self._open_folder() as folder:
            start = f"{seen.stamp.size}-"
            names = [name for name in folder.names() if name.startswith(start)]
            records = [_read_record(folder, name) for name in names[:_MAX_EQUAL]]
            if len(names) > _MAX_EQUAL or any(seen.sample in record[1] for record in records):
                return True
            return digest is not None and all(digest != record[0] for record in records)
        return digest is not None

    def path(self, stamp: FileStamp) -> Path:
        """Return the path of the record of the file with a stamp."""
        return self.directory / _name(stamp)

    @contextlib.contextmanager
    def _open_folder(self, create: bool = False) -> Iterator[Folder]:
        """Open the directory."""
        if self.opener:
            with self.opener(create=create) as folder:
                yield folder
            return
        if create:
            with contextlib.suppress(FileExistsError):
                self.directory.mkdir(mode=0o700)
        with Folder.open(self.directory) as folder:
            yield folder

    def _read(self, seen: Observation) -> tuple[str, bool] | None:
        """Return digest and `trusted` from the record of a file in exactly this state."""
        with contextlib.suppress(OSError, ParoquantStreamError), self._open_folder() as folder:
            digest, identity, trusted = _read_record(folder, _name(seen.stamp))
            return (digest, trusted) if digest and identity == seen.identity else None
        return None

    def _was_known(self, seen: Observation, digest: str) -> bool:
        """Return whether a record of this file and digest is older than the start of its hash."""
        record = self._read(seen)
        if record is None or record[0] != digest:
            return False
        with contextlib.suppress(OSError, ParoquantStreamError), self._open_folder() as folder:
            written = FileStamp.of(folder.stat(_name(seen.stamp)))
            return record[1] or written.is_settled(seen.now_ns, descriptor.RACY_SECONDS)
        return False

    def _write(self, seen: Observation, digest: str, trusted: bool) -> None:
        """Write a record atomically; a failure is ignored."""
        if self.read_only:
            return
        name = _name(seen.stamp)
        temp = f".{name}.{os.getpid()}.{time.monotonic_ns()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with (
            contextlib.suppress(OSError, ParoquantStreamError),
            self._open_folder(create=True) as folder,
        ):
            fd = os.open(temp, flags, 0o600, dir_fd=folder.fd)
            try:
                with open(fd, "wb") as file:
                    file.write(json.dumps([_VERSION, seen.identity, digest, trusted]).encode())
                folder.replace(temp, folder, name)
            except OSError:
                folder.unlink(temp)

    def _now(self) -> tuple[int, Ctime]:
        """Return the time by the clock of the cache's file system, in ns, and its ctime's kind."""
        try:
            # create: a cloned repository lacks its empty directories
            with self._open_folder(create=True) as folder:
                os.utime(folder.fd)  # stamped by the clock of the kernel or of the file server
                stamp, fsid = FileStamp.of(folder.status()), os.fstatvfs(folder.fd).f_fsid
                kind = ctime_kind(folder.fd, stamp.device, fsid)
        except (OSError, ParoquantStreamError):
            return 0, Ctime.NONE
        return min(time.time_ns(), stamp.mtime_ns, stamp.ctime_ns), kind


def _read_record(folder: Folder, name: str) -> tuple[str, list[int | str], bool]:
    """Return digest, identity and `trusted` of a record; of an unusable one no digest."""
    try:
        with open(folder.open_file(name), "rb") as file:
            version, identity, digest, trusted = json.loads(file.read(_MAX_RECORD))
    except (OSError, ParoquantStreamError, ValueError, TypeError, RecursionError):
        return "", [], False
    valid = version == _VERSION and isinstance(digest, str) and len(digest) in (32, 37, 64)
    valid = valid and isinstance(identity, list)
    return (digest, identity, trusted is True) if valid else ("", [], False)


def _name(stamp: FileStamp) -> str:
    """Return the name of the record of the file with a stamp."""
    return f"{stamp.size}-{stamp.device:x}-{stamp.inode:x}"


def hash_file(fd: int, label: str, digest_cache: DigestCache, name: str | None = None) -> str:
    """Hash an open file, store the digest in a cache and return it.

    Args:
        fd: The file.
        label: The name of the file in errors.
        digest_cache: The cache.
        name: The file's digest by its name in the Hub's cache, if it has one.

    Returns:
        The SHA-256 in hex.

    Raises:
        SourceChangedError: The file became shorter meanwhile.
        UnreadableFileError: The operating system cannot read it.
    """
    before, size = digest_cache.begin(fd), file_status(fd, label).st_size
    sha256 = SourceHasher(fd, (), size, label, lambda _: None).finish().sha256
    digest_cache.remember(fd, before, sha256, name)
    return sha256


def _observe(fd: int) -> Observation | None:
    """Return the state of an open file, or None if it cannot be read."""
    try:
        stamp, fsid = FileStamp.of(os.fstat(fd)), os.fstatvfs(fd).f_fsid
        kind, sample = ctime_kind(fd, stamp.device, fsid), _sample(fd, stamp.size)
    except (OSError, ParoquantStreamError):
        return None
    return Observation(stamp, fsid, kind, sample)


def _sample(fd: int, size: int) -> str:
    """Return the XXH3-128 of `SAMPLES` pages: the first, the last and others evenly spaced."""
    count = min(SAMPLE_SIZE, size)
    pages = memoryview(bytearray(SAMPLES * count))
    for index in range(SAMPLES):
        start = (size - count) * index // (SAMPLES - 1)
        read_into(fd, pages[index * count : (index + 1) * count], start, "a sample")
    return xxhash.xxh3_128_hexdigest(pages)
