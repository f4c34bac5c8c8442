"""Regular files by descriptor: safe opening, exact reads, stamps, durability, typed errors.

What macOS does otherwise than Linux with a descriptor is here; each place names its manual page.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import MalformedFileError, UnreadableFileError

TICK_SECONDS = 0.1  # ten ticks of a kernel whose clock ticks 100 times a second, the fewest in use
RACY_SECONDS = 2.0  # the coarsest file system clock in use (FAT, some NFS) ticks every 2 s
WIDE_SECONDS = 86_400.0  # how far two machines' clocks may differ, a wrong time zone included

_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
_NO_CACHE: int | None = getattr(fcntl, "F_NOCACHE", None)
_NO_FULL_SYNC = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)
_MOST = 1 << 30  # bytes per call: read(2) of macOS refuses more than INT_MAX with EINVAL


@dataclass(frozen=True)
class FileStamp:
    """The fields of `stat` that change with a file's content."""

    device: int
    inode: int
    size: int
    """Bytes of the file."""
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Return the stamp in a `stat` result."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    @classmethod
    def of_fd(cls, fd: int, label: str) -> FileStamp:
        """Return the stamp of an open file.

        Args:
            fd: The file.
            label: The name of the file in errors.

        Raises:
            UnreadableFileError: `fstat` failed.
        """
        return cls.of(file_status(fd, label))

    @property
    def in_whole_seconds(self) -> bool:
        """Return whether the ctime has no fraction: from a coarse clock, an image, or 0."""
        return self.ctime_ns % 1_000_000_000 == 0

    def has_content_of(self, other: FileStamp) -> bool:
        """Return whether both are stamps of one file with the same content.

        The ctime is ignored, because renaming a file changes it.
        """
        return replace(self, ctime_ns=0) == replace(other, ctime_ns=0)

    def is_settled(self, now_ns: int, margin: float) -> bool:
        """Return whether any change of the file after `now_ns` must alter the stamp.

        Args:
            now_ns: A time in nanoseconds since 1970.
            margin: Seconds that the stamp must be older: `TICK_SECONDS` if the kernel's own clock
                gave both, `RACY_SECONDS` for any one clock, `WIDE_SECONDS` for those of two hosts.
        """
        return max(self.mtime_ns, self.ctime_ns) + margin * 1e9 <= now_ns


def open_regular(path: Path, *, follow: bool = True, dir_fd: int | None = None) -> int:
    """Open a regular file to read and return its descriptor.

    The type is checked before opening: opening a FIFO would block, and opening a device may have
    side effects.

    Args:
        path: The file.
        follow: Whether `path` may be a symlink.
        dir_fd: An open directory; only the last name of `path` is used then, and the rest is for
            messages.

    Raises:
        MalformedFileError: It is not a regular file.
        OSError: It cannot be opened; with `follow=False` also because it is a symlink.
    """
    name = path if dir_fd is None else path.name
    status = os.stat(name, dir_fd=dir_fd, follow_symlinks=follow)
    if not stat.S_ISLNK(status.st_mode):  # `os.open` refuses a symlink with its own error
        _check_regular(status, path)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        _check_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(status: os.stat_result, path: Path) -> None:
    """Raise MalformedFileError unless the file is a regular one."""
    if not stat.S_ISREG(status.st_mode):
        raise MalformedFileError(
            f"{path}: expected a regular file, found a directory, pipe or device"
        )


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Yield a descriptor and close it after the body, ignoring errors of `close`.

    For descriptors that are only read: their `close` cannot lose data.
    """
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def file_status(fd: int, label: str) -> os.stat_result:
    """Return the `fstat` result of an open file.

    Args:
        fd: The file.
        label: The name of the file in errors.

    Raises:
        UnreadableFileError: `fstat` failed.
    """
    try:
        return os.fstat(fd)
    except OSError as error:
        raise unreadable(label, error) from error


def unreadable(label: str, error: OSError) -> UnreadableFileError:
    """Return the error of a file that the operating system cannot read.

    Args:
        label: The name of the file.
        error: The error of the operating system.
    """
    return UnreadableFileError(
        f"{label}: cannot be read: {error.strerror}; check the disk and run again"
    )


def path_of(fd: int) -> str:
    """Return a path by which a library opens an open file, and reads it from its start.

    Args:
        fd: The file; its offset is set to 0. On macOS what is opened shares that offset, so no two
            threads may open one descriptor at once.

    Raises:
        OSError: It cannot be set.
    """
    os.lseek(fd, 0, os.SEEK_SET)  # fd(4) of macOS: opening /dev/fd/N is dup(N)
    return f"/dev/fd/{fd}"


def make_durable(fd: int) -> None:
    """Write a file, or the names in a directory, to the disk, past the cache of the drive.

    Raises:
        OSError: It cannot be written. That is not tried again: the pages may be lost by then.
    """
    if _FULL_SYNC is not None:  # fsync(2) of macOS: the drive may lose or reorder what it has
        try:
            fcntl.fcntl(fd, _FULL_SYNC)
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:  # SMB, some FUSE: they do nothing then
                raise
        else:
            return
    os.fsync(fd)


def bypass_cache(fd: int) -> None:
    """Let reads and writes of a file leave the page cache as it is, on macOS."""
    if _NO_CACHE is not None:  # fcntl(2) of macOS, in place of O_DIRECT and posix_fadvise
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, _NO_CACHE, 1)


def read_some(fd: int, into: memoryview, offset: int) -> int:
    """Read what one call gives into a buffer of bytes and return how many they are; 0 at the end.

    Raises:
        OSError: The operating system cannot read it.
    """
    into = into[:_MOST]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into], offset)
    data = os.pread(fd, len(into), offset)  # a Python built for macOS 10.15 and older
    into[: len(data)] = data
    return len(data)


def pread_exactly(fd: int, offset: int, length: int, label: str) -> bytes:
    """Read exactly `length` bytes at `offset`.

    Args:
        fd: The file.
        offset: Position of the first byte.
        length: Number of bytes.
        label: The name of the file in errors.

    Raises:
        MalformedFileError: The file ends before.
        UnreadableFileError: The operating system cannot read it.
    """
    chunks = []
    while length:
        try:
            chunk = os.pread(fd, min(length, _MOST), offset)
        except OSError as error:
            raise unreadable(label, error) from error
        if not chunk:
            raise MalformedFileError(
                f"{label}: ends {length:,} bytes before its header says it does"
            )
        chunks.append(chunk)
        offset += len(chunk)
        length -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
