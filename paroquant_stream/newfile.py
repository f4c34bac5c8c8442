"""One new file of the store: written and hashed as a temp, then published whole under its name.

Publishing is: temp file, fsync, rename, fsync of the directory. Without the first fsync a power cut
leaves a committed name with no bytes (seen on ext4); without the second, no name.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import xxhash

from .digest import FileStamp
from .errors import StoreError

_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP)


_open: set[str] = set()


def is_open(name: str) -> bool:
    """Whether this process is writing the temp file of this name, by whatever path."""
    return name in _open


class NewFile:
    """A temp file of the store; `write` hashes, `publish` gives it its name."""

    def __init__(self, path: Path, size: int, mode: int) -> None:
        self._path, self._size, self._written = path, size, 0
        self._hash = xxhash.xxh3_128()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, mode)
            _open.add(path.name)
            try:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fd, 0, size)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    self.discard()
                    raise
        except OSError as error:
            raise _write_error(path, size, error) from error

    @property
    def digest(self) -> str:
        """XXH3-128 of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, chunk: memoryview) -> None:
        """Appends all of `chunk`. Raises StoreError."""
        self._hash.update(chunk)
        chunk = chunk.cast("B")
        try:
            while chunk:
                count = os.write(self._fd, chunk)
                self._written += count
                chunk = chunk[count:]
        except OSError as error:
            raise _write_error(self._path, self._size - self._written, error) from error

    def publish(self, target: Path) -> FileStamp:
        """Makes the file durable under the name `target`, in place of what is there; returns its
        stamp.

        Readers of the old file keep its bytes. An fsync that fails is never tried again: the kernel
        has dropped the pages by then. Raises StoreError.
        """
        try:
            os.fsync(self._fd)
            status = os.fstat(self._fd)
            # fallocate gives the file its size at once: a write that was lost shows in the offset
            reached = min(status.st_size, os.lseek(self._fd, 0, os.SEEK_CUR))
            if not reached == self._written == self._size:
                raise StoreError(
                    f"{self._path}: {reached:,} bytes on disk, {self._size:,} expected"
                )
            target.parent.mkdir(mode=_directory_mode(status.st_mode), exist_ok=True)
            os.replace(self._path, target)
            sync_directory(target.parent)
            sync_directory(target.parent.parent)  # it may hold a new directory's name
            return FileStamp.of(os.stat(target))
        except OSError as error:
            raise _write_error(target, 0, error) from error

    def discard(self) -> None:
        """Closes the file and removes the temp if it is still there."""
        fd, self._fd = self._fd, -1
        _open.discard(self._path.name)
        with contextlib.suppress(OSError):  # nothing that was not synced is ever published
            if fd >= 0:
                os.close(fd)
        with contextlib.suppress(OSError):  # the next run's sweep finds what stays
            self._path.unlink(missing_ok=True)


def _directory_mode(file_mode: int) -> int:
    """0700 beside files of 0600, else whatever the umask leaves of 0777."""
    return 0o777 if file_mode & 0o077 else 0o700


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_error(path: Path, needed: int, error: OSError) -> StoreError:
    reason = f"{path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f"; {needed:,} bytes needed"
        with contextlib.suppress(OSError):
            status = os.statvfs(path.parent)
            reason += f", {status.f_bavail * status.f_frsize:,} free"
        reason += "; make room and run again"
    return StoreError(reason)
