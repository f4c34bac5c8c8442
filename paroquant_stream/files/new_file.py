"""Files written in one stream: hashed while they are written, and published atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import xxhash

from ..errors import StoreError
from ..trace import NO_TRACE, Trace
from .atomic_file import AtomicFile, write_error
from .block_writer import BlockWriter
from .descriptor import FileStamp
from .folder import Folder
from .temp_files import name_beside


class NewFile:
    """A temp file that hashes what is written; `publish` gives it its final name."""

    def __init__(
        self, folder: Folder, name: str, size: int, mode: int, trace: Trace = NO_TRACE
    ) -> None:
        """Create the temp file.

        Args:
            folder: Directory of the temp file; must stay open as long as this object is used.
            name: Name of the temp file.
            size: Bytes that will be written.
            mode: Permission bits.
            trace: Records the stage `write`.

        Raises:
            StoreError: The file cannot be created.
        """
        self._size, self._position = size, 0
        self._hash = xxhash.xxh3_128()
        try:
            self._file = AtomicFile(folder, name, size, mode)
        except OSError as error:
            raise write_error(folder.path / name, size, error) from error
        reopen = partial(os.open, name, dir_fd=folder.fd)
        self._writer = BlockWriter(self._file.fd, reopen, self.path, size, trace)

    @property
    def path(self) -> Path:
        """Return the path of the temp file."""
        return self._file.path

    @property
    def size(self) -> int:
        """Return the bytes of the complete file."""
        return self._size

    @property
    def digest(self) -> str:
        """Return the XXH3-128 of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, chunk: memoryview) -> None:
        """Append bytes.

        Args:
            chunk: The bytes; they are copied, so the buffer can be reused.

        Raises:
            StoreError: These or earlier bytes cannot be written.
        """
        self._hash.update(chunk)
        self._writer.write(chunk, self._position)
        self._position += chunk.nbytes

    def publish(self, folder: Folder, name: str) -> FileStamp:
        """Make the file durable under its final name and return its stamp.

        An existing file of that name is replaced; its readers keep the old bytes.

        Args:
            folder: Directory of the final name.
            name: The final name.

        Raises:
            StoreError: It cannot be made durable, or other than `size` bytes were written.
        """
        self._writer.flush()
        # fallocate has set the size already: only a count shows a lost write
        if self._writer.written != self._size:
            raise StoreError(
                f"{self.path}: {self._writer.written:,} bytes written, {self._size:,} expected"
            )
        try:
            return self._file.publish(folder, name, self._size)
        except OSError as error:
            raise write_error(folder.path / name, 0, error) from error

    def discard(self) -> None:
        """Close the file and remove the temp file unless it was published."""
        self._writer.close()
        self._file.discard()


@contextlib.contextmanager
def new_file_at(path: Path, size: int) -> Iterator[NewFile]:
    """Yield a new file outside the cache and publish it after the body.

    When the body raises, the temp file is removed.

    Args:
        path: The final path.
        size: Bytes that the body writes.

    Raises:
        StoreError: The file cannot be written.
    """
    try:
        folder = Folder.open(path.parent)
    except OSError as error:
        raise write_error(path, size, error) from error
    with folder, new_file_in(folder, path.name, size) as file:
        yield file


@contextlib.contextmanager
def new_file_in(folder: Folder, name: str, size: int) -> Iterator[NewFile]:
    """Yield a new file and publish it after the body, as `new_file_at`.

    Args:
        folder: The open directory of the file.
        name: The final name.
        size: Bytes that the body writes.

    Raises:
        StoreError: The file cannot be written.
    """
    file = NewFile(folder, name_beside(name), size, 0o666)
    try:
        yield file
        file.publish(folder, name)
    finally:
        file.discard()
