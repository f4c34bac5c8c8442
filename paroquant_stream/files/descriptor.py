"""Files by descriptor: opened without blocking, read and never mapped, failures typed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import MalformedFileError, UnreadableFileError

RACY_SECONDS = 2.0  # the coarsest file system clock in use (FAT, some NFS) ticks every 2 s
WIDE_SECONDS = 86_400.0  # what the clocks of two machines may differ by, a wrong time zone included


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
        """The stamp of an open file. Raises UnreadableFileError."""
        return cls.of(file_status(fd, label))

    @property
    def in_whole_seconds(self) -> bool:
        """Whether the ctime is no finer: a coarse clock's, an image's, or 0."""
        return self.ctime_ns % 1_000_000_000 == 0

    def has_content_of(self, other: FileStamp) -> bool:
        """Whether both are of one file with the same content, whatever its name was changed to."""
        return replace(self, ctime_ns=0) == replace(other, ctime_ns=0)

    def is_settled(self, now_ns: int, same_clock: bool) -> bool:
        """Whether a change after `now_ns` must show in the stamp.

        `same_clock`: `now_ns` is by the clock that stamps the file.
        """
        margin = RACY_SECONDS if same_clock else WIDE_SECONDS
        return max(self.mtime_ns, self.ctime_ns) + margin * 1e9 <= now_ns


def open_regular(path: Path, *, follow: bool = True, dir_fd: int | None = None) -> int:
    """A descriptor of the regular file at `path`, or of its last name below a directory `dir_fd`.

    Looks before it opens: a FIFO would block, and opening a device may do something. With
    `follow=False` a symlink is refused. Raises MalformedFileError for anything else than a regular file,
    and OSError as `os.open` does.
    """
    name = path if dir_fd is None else path.name
    status = os.stat(name, dir_fd=dir_fd, follow_symlinks=follow)
    if not stat.S_ISLNK(status.st_mode):  # a link that is refused is left to `os.open`
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
    if not stat.S_ISREG(status.st_mode):
        raise MalformedFileError(
            f"{path}: expected a regular file, found a directory, pipe or device"
        )


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Closes a descriptor that was only read from, after the body; nothing can be lost by it."""
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def file_status(fd: int, label: str) -> os.stat_result:
    """What `fstat` says. Raises UnreadableFileError when it fails."""
    try:
        return os.fstat(fd)
    except OSError as error:
        raise unreadable(label, error) from error


def unreadable(label: str, error: OSError) -> UnreadableFileError:
    """The error for a file that the system cannot read."""
    return UnreadableFileError(
        f"{label}: cannot be read: {error.strerror}; check the disk and run again"
    )


def pread_exactly(fd: int, offset: int, length: int, label: str) -> bytes:
    """`length` bytes at `offset`; a short read is an error, never zeros. Raises UnreadableFileError."""
    chunks = []
    while length:
        try:
            chunk = os.pread(fd, length, offset)
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
