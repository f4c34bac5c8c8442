"""Files written in one stream: hashed while they are written, and published atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ..errors import StoreError
from ..trace import NO_TRACE, Trace
from .atomic_file import AtomicFile, write_error
from .descriptor import FileStamp
from .folder import Folder
from .temp_files import name_beside

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_BLOCK = 4 << 20  # bytes per write; O_DIRECT requires a multiple of the disk's block size
_BLOCKS = 3  # blocks that may wait to be written
_DIRECT = getattr(os, "O_DIRECT", 0)


class NewFile:
    """A temp file that hashes what is written; `publish` gives it its final name.

    Full blocks are written in a second thread, with O_DIRECT where the file system allows it: that
    costs less CPU time and evicts nothing from the page cache.
    """

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
        self._size, self._written, self._trace = size, 0, trace
        self._hash = xxhash.xxh3_128()
        self._block, self._filled = memoryview(b""), 0
        self._free_blocks: list[memoryview] = []
        self._writer: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        try:
            self._file = AtomicFile(folder, name, size, mode, direct=size >= _BLOCK)
        except OSError as error:
            raise write_error(folder.path / name, size, error) from error

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
        chunk = chunk.cast("B")
        while chunk:
            if not self._block:
                self._block = self._take_block()
            count = min(_BLOCK - self._filled, len(chunk))
            self._block[self._filled : self._filled + count] = chunk[:count]
            self._filled += count
            chunk = chunk[count:]
            if self._filled == _BLOCK:
                self._submit_block()

    def _take_block(self) -> memoryview:
        """Return page-aligned memory, as O_DIRECT requires, for a block or the rest of the file."""
        if len(self._pending) == _BLOCKS:
            self._wait(1)
        if self._free_blocks:
            return self._free_blocks.pop()
        space = mmap.mmap(-1, min(_BLOCK, max(self._size - self._written, 1)))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                space.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(space)

    def _submit_block(self) -> None:
        """Queue the full block for the writer thread."""
        if self._writer is None:
            # imported late: a run without work does not need it
            from concurrent.futures import ThreadPoolExecutor

            self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        block, self._block, self._filled = self._block, memoryview(b""), 0
        self._pending.append((self._writer.submit(self._write, block), block))

    def _wait(self, count: int) -> None:
        """Wait until the oldest `count` blocks are written; raise what writing them raised."""
        for _ in range(count):
            future, block = self._pending.popleft()
            future.result()
            self._free_blocks.append(block)

    def _write(self, block: memoryview) -> None:
        """Write a block in the calling thread."""
        with self._trace.span("write"):
            try:
                while block:
                    count = self._write_some(block)
                    self._written += count
                    block = block[count:]
            except OSError as error:
                raise write_error(self.path, self._size - self._written, error) from error

    def _write_some(self, block: memoryview) -> int:
        """Write as much of a block as one call takes, and return the number of bytes."""
        try:
            return os.write(self._file.fd, block)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(self._file.fd):
                raise
            _disable_direct(
                self._file.fd
            )  # after a short write the rest may not be whole disk blocks
            return os.write(self._file.fd, block)

    def publish(self, folder: Folder, name: str) -> FileStamp:
        """Make the file durable under its final name and return its stamp.

        An existing file of that name is replaced; its readers keep the old bytes.

        Args:
            folder: Directory of the final name.
            name: The final name.

        Raises:
            StoreError: It cannot be made durable, or other than `size` bytes were written.
        """
        self._wait(len(self._pending))
        try:
            _disable_direct(self._file.fd)
            self._write(self._block[: self._filled])
            # fallocate has set the size already: only the offset shows a lost write
            reached = os.lseek(self._file.fd, 0, os.SEEK_CUR)
            if not reached == self._written == self._size:
                raise StoreError(f"{self.path}: {reached:,} bytes written, {self._size:,} expected")
            return self._file.publish(folder, name, self._size)
        except OSError as error:
            raise write_error(folder.path / name, 0, error) from error

    def discard(self) -> None:
        """Close the file and remove the temp file unless it was published."""
        if self._writer:
            self._writer.shutdown()
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


def _is_direct(fd: int) -> bool:
    """Return whether a file is open with O_DIRECT."""
    return bool(_DIRECT and fcntl.fcntl(fd, fcntl.F_GETFL) & _DIRECT)


def _disable_direct(fd: int) -> None:
    """Disable O_DIRECT, which cannot write the incomplete block at the end of a file."""
    if _is_direct(fd):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_DIRECT)
