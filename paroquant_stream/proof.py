"""A source file that may be removed: read through one descriptor, and removed only while its name
leads to the very file that was read.

A shard is a file of the model directory, a link to another file in it, or a link into the `blobs`
of the Hub cache that the directory is a snapshot of: `models--o--n/snapshots/<commit>/x` to
`models--o--n/blobs/<etag>`, which may itself be a link to a file that repositories share. Where a
link truly leads is told by descriptors, never by its spelling; to anything else nothing is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from .descriptor import FileStamp, closing, pread_exactly
from .errors import SourceChanged, StoreError
from .folder import Folder
from .hashing import SourceHasher, read_into, sha256_of
from .task import Part

logger = logging.getLogger(__name__)
_Name = tuple[Folder, str, os.stat_result]
"""A name in a directory, and what `lstat` said of it."""
_HOPS = 8  # links on the way to a file; a loop has more


class SourceFile:
    """A shard's file, open, with every name that leads to it."""

    def __init__(self, directory: Path, shard: str) -> None:
        """Open the shard of a model directory.

        Raises:
            StoreError: It is absent, or leads out of the directory and of its Hub cache.
            MalformedFile: It is no regular file.
        """
        self.path, self._hub = directory / shard, _Hub.of(directory)
        self._stack = contextlib.ExitStack()
        try:
            self._names = self._locate(directory, shard)
            folder, name, _ = self._names[-1]
            self.fd = self._stack.enter_context(closing(folder.open_file(name)))
            self.stamp = FileStamp.of_fd(self.fd, str(self.path))
        except OSError as error:
            self.close()
            raise StoreError(f"{self.path}: cannot be looked at: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and the directories that lead to it."""
        self._stack.close()

    def _locate(self, directory: Path, shard: str) -> list[_Name]:
        """Each name on the way to the file, its own first, the file's last, with its `lstat`."""
        folder, name = self._stack.enter_context(Folder.open(directory)), shard
        own, names = _identity(folder.status()), list[_Name]()
        for _ in range(_HOPS):
            status = folder.stat(name)
            names.append((folder, name, status))
            if not stat.S_ISLNK(status.st_mode):
                return names
            parent, name = os.path.split(os.readlink(name, dir_fd=folder.fd))
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            there = os.open(parent or ".", flags, dir_fd=folder.fd)
            folder = self._stack.enter_context(Folder(there, folder.path / parent))
            inside = _identity(folder.status()) == own or (
                self._hub is not None and self._hub.holds(folder)
            )
            if not inside or name in ("", ".", ".."):
                raise StoreError(
                    f"{self.path}: a link to {folder.path / name}, outside of the model directory "
                    "and of its Hub cache; it is not removed"
                )
        raise StoreError(f"{self.path}: more than {_HOPS} links lead to it; it is not removed")

    def sha256(self) -> str:
        """SHA-256 of every byte of the file, read now, through the descriptor.

        Raises:
            SourceChanged: It changed while it was read.
            UnreadableFile: The system cannot read it.
        """
        hasher = SourceHasher(self.fd, (), self.stamp.size, str(self.path), lambda _: None)
        digest = hasher.finish().sha256
        self.check()
        return digest

    def lent_sha256(self, parts: Sequence[Part]) -> str:
        """What a borrower's record says of these parts of the file, read now. See `Task`."""
        digests = []
        for part in parts:
            data = memoryview(bytearray(part.stop - part.start))
            read_into(self.fd, data, part.start, str(self.path))
            digests.append(sha256_of(data))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def header(self) -> bytes:
        """The bytes of its header, length and JSON."""
        length = 8 + int.from_bytes(pread_exactly(self.fd, 0, 8, str(self.path)), "little")
        return pread_exactly(self.fd, 0, length, str(self.path))

    def check(self) -> None:
        """Raises SourceChanged unless the open file is as it was when it was opened, and its names
        still lead to it.
        """
        same = FileStamp.of_fd(self.fd, str(self.path)) == self.stamp
        try:
            found = [_identity(folder.stat(name)) for folder, name, _ in self._names]
        except OSError:
            found = []
        if not same or found != [_identity(status) for _, _, status in self._names]:
            raise SourceChanged(f"{self.path}: changed since it was converted; run again")

    def remove(self) -> None:
        """Remove the file, and then the names that lead to it, if they lead to the file that was
        read; a blob of the Hub's cache that another revision uses stays.

        Raises:
            SourceChanged: It was replaced or changed.
            StoreError: The system does not remove it.
        """
        self.check()
        own, *others = self._names
        try:
            if others and self._hub and self._hub.is_blob(others[0][0]):
                self._hub.remove_blob(others[0][0], others[0][1], own)
            else:
                for folder, name, _ in reversed(others):  # the file first: its links then dangle
                    folder.unlink(name)
            own[0].unlink(own[1])
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be removed: {error.strerror}") from error


def remove_dangling_link(directory: Path, shard: str) -> None:
    """Remove the link that a killed run left to a file that it had removed. Raises StoreError."""
    try:
        with Folder.open(directory) as folder:
            if stat.S_ISLNK(folder.stat(shard).st_mode) and not os.path.exists(directory / shard):
                folder.unlink(shard)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"{directory / shard}: cannot be removed: {error.strerror}") from error


class _Hub:
    """The repository of a Hub cache that a model directory is a snapshot of."""

    def __init__(self, repository: Path, blobs: Folder) -> None:
        self._repository, self._blobs = repository, _identity(blobs.status())
        self._shared = None  # <hub>/blobs, whose files repositories share
        with contextlib.suppress(OSError), Folder.open(repository.parent) as hub:
            with hub.child("blobs") as shared:
                self._shared = _identity(shared.status())

    @classmethod
    def of(cls, directory: Path) -> _Hub | None:
        """The repository, or None for a directory that is no snapshot of one."""
        snapshots = Path(os.path.realpath(directory)).parent
        repository = snapshots.parent
        if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
            return None
        with contextlib.suppress(OSError), Folder.open(repository) as folder:
            with folder.child("blobs") as blobs:
                return cls(repository, blobs)
        return None

    def is_blob(self, folder: Folder) -> bool:
        """Whether a directory is the repository's `blobs`."""
        return _identity(folder.status()) == self._blobs

    def holds(self, folder: Folder) -> bool:
        """Whether a directory is the repository's `blobs`, or one of the files that all share."""
        if self.is_blob(folder):
            return True
        above = _identity(os.stat("..", dir_fd=folder.fd))
        return self._shared is not None and above == self._shared

    def remove_blob(self, blobs: Folder, name: str, link: _Name) -> None:
        """Remove a blob, unless a link other than `link` leads to it. Raises OSError."""
        if self._is_used(name, link):
            logger.warning("%s stays: another revision of the Hub's cache uses it", name)
            return
        shared = None
        if stat.S_ISLNK(blobs.stat(name).st_mode):
            shared = Path(os.path.realpath(self._repository / "blobs" / name))
        blobs.unlink(name)
        _sweep_shared(shared, self._repository.parent)

    def _is_used(self, blob: str, link: _Name) -> bool:
        own = _identity(link[0].status()), link[1]
        for directory, _, names in os.walk(self._repository / "snapshots"):
            here = _identity(os.stat(directory))
            for name in names:
                with contextlib.suppress(OSError):  # no link
                    parent, target = os.path.split(os.readlink(os.path.join(directory, name)))
                    there = _identity(os.stat(os.path.join(directory, parent)))
                    if target == blob and there == self._blobs and (here, name) != own:
                        return True
        return False


def _sweep_shared(shared: Path | None, cache: Path) -> None:
    """Remove a file that the Hub's client shares between repositories, if no other uses it."""
    if shared:
        with contextlib.suppress(ImportError):  # from release 2 on, see pull request 4498 there
            from huggingface_hub.utils._shared_blobs import sweep_shared_blob

            sweep_shared_blob(shared, cache_dir=cache)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
