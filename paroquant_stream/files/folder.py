"""Directories by descriptor: what is below one is reached name by name, and no link is followed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from .descriptor import open_regular

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open directory. Its path is for messages: every operation goes by the descriptor."""

    def __init__(self, fd: int, path: Path) -> None:
        """Takes over `fd`."""
        self.fd, self.path = fd, path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open the directory that the caller named; links on the way to it are followed.

        Raises OSError.
        """
        return cls(os.open(path, _DIRECTORY), path)

    def child(self, name: str, create: int | None = None) -> Folder:
        """Open a directory in this one; a link in its place is an error.

        Args:
            name: One name, without a separator.
            create: The mode to make it with where it is absent.

        Raises:
            OSError: It is absent, a link (ELOOP or ENOTDIR) or no directory.
        """
        flags = _DIRECTORY | os.O_NOFOLLOW
        try:
            return Folder(os.open(name, flags, dir_fd=self.fd), self.path / name)
        except FileNotFoundError:
            if create is None:
                raise
        with contextlib.suppress(FileExistsError):  # another run was faster
            os.mkdir(name, create, dir_fd=self.fd)
            os.fsync(self.fd)
        return Folder(os.open(name, flags, dir_fd=self.fd), self.path / name)

    def status(self) -> os.stat_result:
        """What `fstat` says of the directory itself. Raises OSError."""
        return os.fstat(self.fd)

    def stat(self, name: str) -> os.stat_result:
        """What `lstat` says of a name. Raises OSError."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def open_file(self, name: str) -> int:
        """Open a regular file to read. Raises OSError, MalformedFileError for anything else."""
        return open_regular(self.path / name, follow=False, dir_fd=self.fd)

    def names(self) -> list[str]:
        """The names in it, sorted. Raises OSError."""
        return sorted(os.listdir(self.fd))

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Its regular files by name; what goes meanwhile is left out. Raises OSError."""
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                status = self.stat(name)
                if stat.S_ISREG(status.st_mode):
                    yield name, status

    def unlink(self, name: str) -> None:
        """Remove a file or a link. Raises OSError."""
        os.unlink(name, dir_fd=self.fd)

    def replace(self, name: str, target: Folder, new_name: str) -> None:
        """Rename a file, in place of what has the new name. Raises OSError."""
        os.replace(name, new_name, src_dir_fd=self.fd, dst_dir_fd=target.fd)

    def sync(self) -> None:
        """Make its names durable. Raises OSError."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # it was only read from
                os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
