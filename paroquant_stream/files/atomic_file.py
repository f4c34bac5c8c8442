"""A file that gets its name only when it is complete: temp, fsync, rename, fsync of the directory.

Without the first fsync, a power cut can leave the name with an empty file (seen on ext4); without
the second, the name can be lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ..errors import StoreError
from ..text import bytes_text
from . import temp_files
from .descriptor import FileStamp, make_durable
from .filesystems import is_in_memory
from .folder import Folder

_LARGE = 16 << 20  # bytes
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP)


class AtomicFile:
    """A temp file with its lock and lease; `publish` renames it, `discard` removes it."""

    def __init__(self, folder: Folder, name: str, size: int, mode: int) -> None:
        """Create the temp file.

        Args:
            folder: Directory of the temp file; must stay open as long as this object is used.
            name: Name of the temp file; `temp_files.sweep` can remove it after a crash only if it
                is from `temp_files.temp_name`.
            size: Bytes to reserve on the disk.
            mode: Permission bits.

        Raises:
            OSError: The file cannot be created.
        """
        self._folder, self._name, self._is_temp = folder, name, False
        self.fd = -1
        temp_files.announce(name)  # first, or a sweep in another thread could remove the file
        try:
            self.fd = _create(folder, name, mode)
            self._is_temp = True  # set after the creation: a file that was there is not ours
            temp_files.hold(name, self.fd)
            _reserve(self.fd, size)
        except BaseException:  # an interrupt too must leave neither file nor lease
            self.discard()
            raise

    @property
    def path(self) -> Path:
        """Return the path of the temp file."""
        return self._folder.path / self._name

    def publish(self, folder: Folder, name: str, size: int) -> FileStamp:
        """Make the file durable under its final name and return its stamp.

        An existing file of that name is replaced; its readers keep the old bytes. A failed fsync is
        not repeated, because the kernel has dropped the dirty pages by then.

        Args:
            folder: Directory of the final name.
            name: The final name.
            size: Bytes that the file must have.

        Raises:
            StoreError: The file has another size.
            OSError: The file cannot be made durable.
        """
        make_durable(self.fd)
        if (reached := os.fstat(self.fd).st_size) != size:
            raise StoreError(f"{self.path}: {reached:,} bytes on disk, {size:,} expected")
        self._folder.replace(self._name, folder, name)
        self._is_temp = False
        folder.sync()
        return FileStamp.of(os.fstat(self.fd))

    def discard(self) -> None:
        """Close the file and remove the temp file unless it was published."""
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):  # the sweep of the next run removes it
            if self._is_temp:
                self._folder.unlink(self._name)
        with contextlib.suppress(OSError):  # a published file was synced before
            if fd >= 0:
                os.close(fd)
        temp_files.release(self._name)


def _reserve(fd: int, size: int) -> None:
    """Reserve disk space where the system can, so that a full disk shows before the work."""
    if size and hasattr(os, "posix_fallocate"):  # the os module's docs: not on macOS
        if size >= _LARGE and is_in_memory(fd):  # its pages would be cleared before they are filled
            return
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise


def _create(folder: Folder, name: str, mode: int) -> int:
    """Create a new file and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, mode, dir_fd=folder.fd)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds a path, which need not exist.

    Raises:
        OSError: The file system cannot be queried.
    """
    existing = next((p for p in (path, *path.parents) if os.path.exists(p)), path)
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: The directory cannot be opened or synced.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        make_durable(fd)
    finally:
        os.close(fd)


def write_error(path: Path, needed: int, error: OSError) -> StoreError:
    """Return the StoreError of a file that cannot be written, see `write_problem`."""
    return StoreError(write_problem(path, needed, error))


def write_problem(path: Path, needed: int, error: OSError) -> str:
    """Explain in one line why a file cannot be written.

    Args:
        path: The file.
        needed: Bytes still to be written, shown when the disk is full.
        error: The error of the operating system.
    """
    reason = f"{path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f"; {bytes_text(needed)} needed"
        with contextlib.suppress(OSError):
            reason += f", {bytes_text(free_bytes(path.parent))} free"
        reason += "; free some space and run again"
    return reason
