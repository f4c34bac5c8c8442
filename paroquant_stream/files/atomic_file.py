"""A file outside of its name until it is whole: a temp, then fsync, rename, fsync of the directory.

Without the first fsync a power cut leaves a committed name with no bytes (seen on ext4); without
the second, no name.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ..errors import StoreError
from . import temp_files
from .descriptor import FileStamp
from .folder import Folder

_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP)
_DIRECT = getattr(os, "O_DIRECT", 0)


class AtomicFile:
    """A temp file with its lease; `publish` gives it its name, `discard` removes it."""

    def __init__(self, folder: Folder, name: str, size: int, mode: int, direct: bool) -> None:
        """Make a temp in a directory that stays open as long as this file.

        Args:
            folder: Where the temp lies.
            name: Its name; ends in one of `temp_files.temp_name`, by which a sweep knows it.
            size: Bytes to reserve on the disk.
            mode: Permission bits.
            direct: Whether to write past the page cache, where the file system can.

        Raises:
            OSError: It cannot be made.
        """
        self._folder, self._name, self._is_temp = folder, name, False
        self.fd = -1
        temp_files.announce(name)  # before it exists: another thread may sweep just now
        try:
            self.fd = _create(folder, name, mode, direct)
            self._is_temp = True  # else what lies there is not ours
            temp_files.hold(name, self.fd)
            _reserve(self.fd, size)
        except OSError:
            self.discard()
            raise

    @property
    def path(self) -> Path:
        """Where the temp lies until it is published."""
        return self._folder.path / self._name

    def publish(self, folder: Folder, name: str, size: int) -> FileStamp:
        """Make the file durable under a name, in place of what has it, and return its stamp.

        Readers of the old file keep its bytes. An fsync that fails is never tried again: the kernel
        has dropped the pages by then.

        Raises:
            StoreError: It has not `size` bytes.
            OSError: It cannot be made durable.
        """
        os.fsync(self.fd)
        if (reached := os.fstat(self.fd).st_size) != size:
            raise StoreError(f"{self.path}: {reached:,} bytes on disk, {size:,} expected")
        self._folder.replace(self._name, folder, name)
        self._is_temp = False
        folder.sync()
        return FileStamp.of(os.fstat(self.fd))

    def discard(self) -> None:
        """Close the file and remove the temp if it is still there."""
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):  # the next run's sweep finds what stays
            if self._is_temp:
                self._folder.unlink(self._name)
        with contextlib.suppress(OSError):  # nothing that was not synced is ever published
            if fd >= 0:
                os.close(fd)
        temp_files.release(self._name)


def _reserve(fd: int, size: int) -> None:
    """Take the disk's space now, where the file system can: a full disk shows before the work."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise


def _create(folder: Folder, name: str, mode: int, direct: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if direct and _DIRECT:
        try:
            return os.open(name, flags | _DIRECT, mode, dir_fd=folder.fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without O_DIRECT says
                raise
            with contextlib.suppress(FileNotFoundError):
                folder.unlink(name)  # Linux has made the file by then
    return os.open(name, flags, mode, dir_fd=folder.fd)


def free_bytes(path: Path) -> int:
    """Return the bytes free where a path lies or would lie. Raises OSError."""
    place = next((p for p in (path, *path.parents) if os.path.exists(p)), path)
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_error(path: Path, needed: int, error: OSError) -> StoreError:
    """Return the StoreError of a file that cannot be written."""
    return StoreError(write_problem(path, needed, error))


def write_problem(path: Path, needed: int, error: OSError) -> str:
    """Tell why a file cannot be written, in one line; on a full disk with the bytes needed and free."""
    reason = f"{path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f"; {needed:,} bytes needed"
        with contextlib.suppress(OSError):
            reason += f", {free_bytes(path.parent):,} free"
        reason += "; make room and run again"
    return reason
