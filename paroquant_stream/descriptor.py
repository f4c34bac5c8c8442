"""Files by descriptor: opened without blocking, read and never mapped, failures typed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import MalformedFile, UnreadableFile


def open_regular(path: Path, *, follow: bool = True) -> int:
    """A descriptor of the regular file at `path`.

    Never opens a FIFO or a device: opened, a tape rewinds and a writer's wait for a reader ends.
    What becomes one meanwhile does not block. With `follow=False` a symlink is refused.
    Raises MalformedFile for anything else than a regular file, and OSError as `os.open` does.
    """
    _check_regular(path, os.stat(path, follow_symlinks=follow))
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    try:
        _check_regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise MalformedFile(f"{path}: expected a regular file, found a directory, pipe or device")


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Closes a descriptor that was only read from, after the body; nothing can be lost by it."""
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def file_status(fd: int, label: str) -> os.stat_result:
    """What `fstat` says. Raises UnreadableFile when it fails."""
    try:
        return os.fstat(fd)
    except OSError as error:
        raise unreadable(label, error) from error


def unreadable(label: str, error: OSError) -> UnreadableFile:
    """The error for a file that the system cannot read."""
    return UnreadableFile(
        f"{label}: cannot be read: {error.strerror}; check the disk and run again"
    )


def pread_exactly(fd: int, offset: int, length: int, label: str) -> bytes:
    """`length` bytes at `offset`; a short read is an error, never zeros. Raises UnreadableFile."""
    chunks = []
    while length:
        try:
            chunk = os.pread(fd, length, offset)
        except OSError as error:
            raise unreadable(label, error) from error
        if not chunk:
            raise MalformedFile(f"{label}: ends {length:,} bytes before its header says it does")
        chunks.append(chunk)
        offset += len(chunk)
        length -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
