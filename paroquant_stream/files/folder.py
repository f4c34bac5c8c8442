"""Directories by descriptor: names below one are opened one by one, without following links."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from .descriptor import make_durable, open_regular

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open directory.

    Every operation uses the descriptor; the path is only for messages. A name is a single path
    component.
    """

    def __init__(self, fd: int, path: Path) -> None:
        """Take ownership of an open directory's descriptor."""
        self.fd, self.path = fd, path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open a directory by path; links in the path are followed.

        Raises:
            OSError: It is absent, not a directory or cannot be opened.
        """
        return cls(os.open(path, _DIRECTORY), path)

    def child(self, name: str, create: int | None = None) -> Folder:
        """Open a directory in this one.

        Args:
            name: Its name.
            create: Permission bits to create it with if it is absent; None does not create it.

        Raises:
            OSError: It is absent, a link (ELOOP or ENOTDIR) or not a directory.
        """
        flags = _DIRECTORY | os.O_NOFOLLOW
        try:
            return Folder(os.open(name, flags, dir_fd=self.fd), self.path / name)
        except FileNotFoundError:
            if create is None:
                raise
        with contextlib.suppress(FileExistsError):  # another process created it meanwhile
            os.mkdir(name, create, dir_fd=self.fd)
            make_durable(self.fd)
        return Folder(os.open(name, flags, dir_fd=self.fd), self.path / name)

    def status(self) -> os.stat_result:
        """Return the `fstat` result of the directory itself.

        Raises:
            OSError: `fstat` failed.
        """
        return os.fstat(self.fd)

    def stat(self, name: str) -> os.stat_result:
        """Return the `lstat` result of a name in the directory.

        Raises:
            OSError: The name is absent or cannot be read.
        """
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def open_file(self, name: str) -> int:
        """Open a regular file to read and return its descriptor.

        Raises:
            MalformedFileError: It is not a regular file.
            OSError: It is absent, a link or cannot be opened.
        """
        return open_regular(self.path / name, follow=False, dir_fd=self.fd)

    def names(self) -> list[str]:
        """Return the names in the directory, sorted.

        Raises:
            OSError: The directory cannot be read.
        """
        return sorted(os.listdir(self.fd))

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield name and `lstat` result of every regular file, sorted by name.

        Files that are removed meanwhile are skipped.

        Raises:
            OSError: The directory cannot be read.
        """
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                status = self.stat(name)
                if stat.S_ISREG(status.st_mode):
                    yield name, status

    def unlink(self, name: str) -> None:
        """Remove a file or a link.

        Raises:
            OSError: It cannot be removed.
        """
        os.unlink(name, dir_fd=self.fd)

    def replace(self, name: str, target: Folder, new_name: str) -> None:
        """Rename a file and replace the one that has the new name.

        Args:
            name: Name in this directory.
            target: Directory of the new name, on the same file system.
            new_name: Name in `target`.

        Raises:
            OSError: It cannot be renamed.
        """
        os.replace(name, new_name, src_dir_fd=self.fd, dst_dir_fd=target.fd)

    def sync(self) -> None:
        """Make the names in the directory durable.

        Raises:
            OSError: The directory cannot be synced.
        """
        make_durable(self.fd)

    def close(self) -> None:
        """Close the descriptor; further calls do nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # a directory has no data that close could lose
                os.close(fd)

    def __enter__(self) -> Folder:
        """Return the folder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the descriptor."""
        self.close()
