"""A source file that may be removed, while its name leads to the very file that was read.

A shard is a file of the model directory, a link to another file in it, or a link into the `blobs`
of the Hub cache that the directory is a snapshot of: `models--o--n/snapshots/<commit>/x` to
`models--o--n/blobs/<etag>`, which may itself be a link to a file that repositories share. Where a
link leads is found by descriptors, never by its spelling; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
from collections.abc import Container, Sequence
from pathlib import Path

from ..checkpoint.hub_cache import HubCache, identity
from ..errors import SourceChangedError, StoreError
from ..files.descriptor import FileStamp, closing
from ..files.folder import Folder
from ..files.hashing import SourceHasher, sha256_of_range
from ..files.tensor_header import read_header_bytes
from ..plan.task import Part

logger = logging.getLogger(__name__)
_ASIDE = ".removing"
_ASIDE_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.removing")
"""A file about to be removed; its former name stands between the first dot and the last two."""
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_Name = tuple[Folder, str, os.stat_result]
"""A name in a directory, and what `lstat` said of it."""
_HOPS = 8  # links that may lead to a file; a loop has more


class SourceFile:
    """A shard's file, open, with every name that leads to it."""

    def __init__(self, model_dir: Folder, shard: str) -> None:
        """Open a shard.

        Args:
            model_dir: The model directory.
            shard: The name of the shard.

        Raises:
            StoreError: It is absent, or leads out of the directory and of its Hub cache.
            MalformedFileError: It is no regular file.
        """
        self.path, self._hub = model_dir.path / shard, HubCache.of(model_dir.path)
        self._stack = contextlib.ExitStack()
        try:
            self._names = self._locate(model_dir, shard)
            folder, name, _ = self._names[-1]
            self.fd = self._stack.enter_context(closing(folder.open_file(name)))
            self.stamp = FileStamp.of_fd(self.fd, str(self.path))
        except OSError as error:
            self.close()
            raise StoreError(f"{self.path}: cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and the directories that lead to it."""
        self._stack.close()

    def _locate(self, model_dir: Folder, shard: str) -> list[_Name]:
        """Return each name that leads to the file, with its `lstat`; the file's own is the last."""
        folder, name = model_dir, shard
        own, names = identity(folder.status()), list[_Name]()
        for _ in range(_HOPS):
            status = folder.stat(name)
            names.append((folder, name, status))
            if not stat.S_ISLNK(status.st_mode):
                return names
            parent, name = os.path.split(os.readlink(name, dir_fd=folder.fd))
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            there = os.open(parent or ".", flags, dir_fd=folder.fd)
            folder = self._stack.enter_context(Folder(there, folder.path / parent))
            inside = identity(folder.status()) == own or (
                self._hub is not None and self._hub.holds(folder)
            )
            if not inside or name in ("", ".", ".."):
                raise StoreError(
                    f"{self.path}: a link to {folder.path / name}, which lies neither directly in "
                    "the model directory nor in its Hub cache; it is not removed: convert without "
                    "--drop-source and remove it yourself"
                )
        raise StoreError(f"{self.path}: more than {_HOPS} links lead to it; it is not removed")

    def sha256(self) -> str:
        """Hash every byte of the file, read now, through the descriptor.

        Raises:
            SourceChangedError: It changed while it was read.
            UnreadableFileError: The system cannot read it.
        """
        hasher = SourceHasher(self.fd, (), self.stamp.size, str(self.path), lambda _: None)
        digest = hasher.finish().sha256
        self.check()
        return digest

    def lent_sha256(self, parts: Sequence[Part]) -> str:
        """Hash these parts of the file, read now, as `Task.borrowed_sha256` does."""
        digests = (sha256_of_range(self.fd, (p.start, p.stop), str(self.path)) for p in parts)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def header(self) -> bytes:
        """Read the bytes of its header, length and JSON."""
        return read_header_bytes(self.fd, str(self.path))

    def check(self) -> None:
        """Check that the open file is as it was when it was opened, and its names still lead to it.

        Raises:
            SourceChangedError: It is not.
        """
        same = FileStamp.of_fd(self.fd, str(self.path)) == self.stamp
        try:
            found = [identity(folder.stat(name)) for folder, name, _ in self._names]
        except OSError:
            found = []
        if not same or found != [identity(status) for _, _, status in self._names]:
            raise SourceChangedError(f"{self.path}: changed since it was converted; run again")

    def remove(self) -> None:
        """Remove the file, then the names that lead to it, if they lead to the file that was read.

        A blob of the Hub's cache that another revision uses stays. The file is renamed first,
        checked again, and put back if it is another one: it could be replaced before an unlink.

        Raises:
            SourceChangedError: It was replaced or changed.
            StoreError: The system does not remove it.
        """
        self.check()
        own, *others = self._names
        try:
            if others and self._hub and self._hub.is_blob(others[0][0]):
                if self._hub.is_used(others[0][1], own):
                    logger.warning("%s stays: another revision of the Hub uses it", others[0][1])
                else:
                    self._remove_file(others[0])
                    if len(others) > 1:  # a blob that leads to a file of several repositories
                        self._hub.sweep_shared(others[1])
            else:
                self._remove_file(self._names[-1])
                for folder, name, _ in reversed(others[:-1]):
                    folder.unlink(name)
            if others:
                own[0].unlink(own[1])
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be removed: {error.strerror}") from error

    def _remove_file(self, found: _Name) -> None:
        folder, name, status = found
        aside = f".{name}.{os.urandom(8).hex()}{_ASIDE}"
        os.rename(name, aside, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        same = FileStamp.of_fd(self.fd, str(self.path)).has_content_of(self.stamp)
        if not same or identity(folder.stat(aside)) != identity(status):
            put_back(folder, aside)
            raise SourceChangedError(f"{self.path}: changed since it was converted; run again")
        folder.unlink(aside)


def put_back(folder: Folder, aside: str) -> None:
    """Give a file that was renamed to be removed its name again, unless another has it."""
    name = aside[1 : -len(_ASIDE) - 17]
    where = {"src_dir_fd": folder.fd, "dst_dir_fd": folder.fd}
    try:
        os.link(aside, name, **where, follow_symlinks=False)
        folder.unlink(aside)
    except FileExistsError:
        logger.warning("%s: stays, as there is another %s now", folder.path / aside, name)
    except OSError:  # a file system without hard links
        if name in folder.names():
            raise
        os.rename(aside, name, **where)


def put_all_back(directory: Path, shards: Container[str]) -> None:
    """Give the files that killed runs had renamed to be removed their names again.

    Args:
        directory: The model directory.
        shards: The names of its shards; other files of such a name are not of this program.

    Raises:
        StoreError: The system does not rename them.
    """
    hub = HubCache.of(directory)
    for path in (directory, *([hub.blobs] if hub else [])):
        try:
            with Folder.open(path) as folder:
                for name in folder.names():
                    match = _ASIDE_NAME.fullmatch(name)
                    if match and (match[1] in shards or _BLOB.fullmatch(match[1])):
                        put_back(folder, name)
        except OSError as error:
            raise StoreError(
                f"{path}: leftovers of an interrupted run cannot be renamed: {error.strerror}"
            ) from error


def remove_dangling_link(model_dir: Folder, shard: str) -> None:
    """Remove the link that a killed run left to a file that it had removed. Raises StoreError."""
    try:
        if stat.S_ISLNK(model_dir.stat(shard).st_mode):
            try:
                os.stat(shard, dir_fd=model_dir.fd)
            except FileNotFoundError:
                model_dir.unlink(shard)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(
            f"{model_dir.path / shard}: cannot be removed: {error.strerror}"
        ) from error
