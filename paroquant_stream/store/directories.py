"""The directories of a store: opened without following links, checked for their owner.

Below the root no link is followed, and every directory must belong to the owner of the root, as
weights that other users could replace are untrusted input.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MalformedFileError, StoreError
from ..files.atomic_file import sync_directory
from ..files.folder import Folder
from .location import check_owner, free_bytes, mark_as_cache, open_child

_KINDS = ("entries", "manifests", "dropped", "memo", "tmp", "locks")


@dataclass(frozen=True)
class StoreDirectories:
    """The root of a store and the directories below it."""

    root: Path
    private: bool = True
    """Whether it is a user's cache: modes 0700 and 0600 whatever the umask, its root may be a link.
    Otherwise it is in a model directory and follows the umask and that directory's owner."""
    read_only: bool = False
    """Whether writing is refused, as in a dry run or in another user's model directory."""

    def folder(self, kind: str) -> Path:
        """Return the path of a directory, for messages: one of `_KINDS`, or `damaged`."""
        return self.root / "v1" / kind

    @property
    def _modes(self) -> tuple[int, int]:
        """Return the modes of new directories and files."""
        return (0o700, 0o600) if self.private else (0o777, 0o666)

    @contextlib.contextmanager
    def opened(self, *names: str, create: bool = False) -> Iterator[Folder]:
        """Open `v1` or a directory below it, without following a link below the root.

        Args:
            names: The path below `v1`.
            create: Create absent directories.

        Yields:
            The directory.

        Raises:
            FileNotFoundError: It is absent.
            StoreError: A directory is a link or a file, or others could write into it.
            OSError: A directory cannot be opened or created.
        """
        base, first = (self.root, ()) if self.private else (self.root.parent, (self.root.name,))
        folder = Folder.open(base)
        try:
            trusted = None if self.private else folder.status()
            if self.private:
                check_owner(folder, None)
            for name in (*first, "v1", *names):
                above, folder = folder, open_child(folder, name, self._modes[0] if create else None)
                above.close()
                check_owner(folder, trusted)
            yield folder
        finally:
            folder.close()

    def check_owner(self) -> None:
        """Check that other users could not replace entries; an absent store is safe.

        Raises:
            StoreError: The store belongs to another user than its model directory or this process,
                others can write into it, or it cannot be opened.
        """
        try:
            with self.opened():
                pass
        except (FileNotFoundError, NotADirectoryError):  # `create` makes it or reports the error
            pass
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be opened: {error.strerror}") from error

    def create(self) -> None:
        """Create the directories, durably.

        Raises:
            StoreError: A directory cannot be created.
        """
        try:
            if self.private:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for kind in _KINDS if self.private else _KINDS[:-1]:
                with self.opened(kind, create=True):
                    pass
            if self.private:
                mark_as_cache(self.root)
            for path in (self.root, self.root.parent):
                sync_directory(path)
        except OSError as error:
            raise StoreError(
                f"{self.root}: cannot make the cache: {error.strerror}; try --cache-dir"
            ) from error

    def free_bytes(self) -> int:
        """Return the free bytes of the store's file system.

        Raises:
            StoreError: They cannot be determined.
        """
        return free_bytes(self.root)

    def file_names(self, kind: str) -> list[str]:
        """List the names of the regular files in a directory, as for `folder`."""
        with contextlib.suppress(OSError), self.opened(kind) as folder:
            return [name for name, _ in folder.files()]
        return []

    def folder_size(self, kind: str) -> int:
        """Return the bytes of the regular files in a directory, as for `folder`."""
        with contextlib.suppress(OSError), self.opened(kind) as folder:
            return sum(status.st_size for _, status in folder.files())
        return 0

    def read_file(self, kind: str, name: str, limit: int) -> bytes | None:
        """Read a small file.

        Args:
            kind: The directory, as for `folder`.
            name: The file's name.
            limit: The most bytes that the caller accepts.

        Returns:
            At most `limit` + 1 bytes, so that a larger file is noticed; None if the file is absent
            or cannot be read.
        """
        with contextlib.suppress(OSError, MalformedFileError), self.opened(kind) as folder:
            with os.fdopen(folder.open_file(name), "rb") as file:
                return file.read(limit + 1)
        return None

    @contextlib.contextmanager
    def _writing(self, *names: str) -> Iterator[Folder]:
        """Open or create a directory to publish into; errors are StoreErrors."""
        if self.read_only:
            raise StoreError(f"{self.root}: is opened read-only, nothing is written there")
        try:
            with self.opened(*names, create=True) as folder:
                yield folder
        except OSError as error:
            path = self.folder("/".join(names))
            raise StoreError(f"{path}: cannot be written: {error.strerror}") from error
