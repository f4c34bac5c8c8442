"""A new file written in one stream: hashed on the way, published whole under its name."""

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
from ..trace import SILENCE, Trace
from .atomic_file import AtomicFile, write_error
from .descriptor import FileStamp
from .folder import Folder
from .temp_files import name_beside

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_BLOCK = 4 << 20  # bytes a write; a multiple of any disk's blocks, as O_DIRECT wants it
_BLOCKS = 3  # queued to be written
_DIRECT = getattr(os, "O_DIRECT", 0)


class NewFile:
    """A temp file of the store; `write` hashes, `publish` gives it its name.

    Whole blocks go to the disk in a thread of their own, past the page cache where the system can:
    into it, 3.7 GB cost 3 to 7 s of a core on a machine whose free memory is not backed, past it
    0.2 s, and nothing that others have cached is driven out.
    """

    def __init__(
        self, folder: Folder, name: str, size: int, mode: int, trace: Trace = SILENCE
    ) -> None:
        """Make the temp `name` in a directory that stays open as long as this file."""
        self._size, self._written, self._trace = size, 0, trace
        self._hash = xxhash.xxh3_128()
        self._block, self._filled = memoryview(b""), 0
        self._spare: list[memoryview] = []
        self._writer: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        try:
            self._file = AtomicFile(folder, name, size, mode, direct=size >= _BLOCK)
        except OSError as error:
            raise write_error(folder.path / name, size, error) from error

    @property
    def path(self) -> Path:
        """Where the temp lies until it is published."""
        return self._file.path

    @property
    def size(self) -> int:
        """Bytes that it has once it is published."""
        return self._size

    @property
    def digest(self) -> str:
        """XXH3-128 of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, chunk: memoryview) -> None:
        """Appends all of `chunk`, which may change afterwards. Raises StoreError, perhaps for what
        was written before.
        """
        self._hash.update(chunk)
        chunk = chunk.cast("B")
        while chunk:
            if not self._block:
                self._block = self._empty_block()
            count = min(_BLOCK - self._filled, len(chunk))
            self._block[self._filled : self._filled + count] = chunk[:count]
            self._filled += count
            chunk = chunk[count:]
            if self._filled == _BLOCK:
                self._hand_over()

    def _empty_block(self) -> memoryview:
        """Memory for a block, or for the rest of the file; on a page, as O_DIRECT wants it."""
        if len(self._pending) == _BLOCKS:
            self._wait(1)
        if self._spare:
            return self._spare.pop()
        space = mmap.mmap(-1, min(_BLOCK, max(self._size - self._written, 1)))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                space.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(space)

    def _hand_over(self) -> None:
        """Lets the full block be written."""
        if self._writer is None:
            from concurrent.futures import (
                ThreadPoolExecutor,  # 3 ms, which a run without work saves
            )

            self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        block, self._block, self._filled = self._block, memoryview(b""), 0
        self._pending.append((self._writer.submit(self._write, block), block))

    def _wait(self, count: int) -> None:
        """Returns when the oldest `count` blocks are written. Raises what writing them raised."""
        for _ in range(count):
            future, block = self._pending.popleft()
            future.result()
            self._spare.append(block)

    def _write(self, block: memoryview) -> None:
        with self._trace.span("write"):
            try:
                while block:
                    count = self._write_some(block)
                    self._written += count
                    block = block[count:]
            except OSError as error:
                raise write_error(self.path, self._size - self._written, error) from error

    def _write_some(self, block: memoryview) -> int:
        try:
            return os.write(self._file.fd, block)
        except OSError as error:
            if error.errno != errno.EINVAL or not _past_the_cache(self._file.fd):
                raise
            _through_the_cache(self._file.fd)  # after a short write the rest may be no whole blocks
            return os.write(self._file.fd, block)

    def publish(self, folder: Folder, name: str) -> FileStamp:
        """Makes the file durable under a name, in place of what has it; returns its stamp.

        Readers of the old file keep its bytes. An fsync that fails is never tried again: the kernel
        has dropped the pages by then. Raises StoreError.
        """
        self._wait(len(self._pending))
        try:
            _through_the_cache(self._file.fd)
            self._write(self._block[: self._filled])
            # fallocate gives the file its size at once: a write that was lost shows in the offset
            reached = os.lseek(self._file.fd, 0, os.SEEK_CUR)
            if not reached == self._written == self._size:
                raise StoreError(f"{self.path}: {reached:,} bytes written, {self._size:,} expected")
            return self._file.publish(folder, name, self._size)
        except OSError as error:
            raise write_error(folder.path / name, 0, error) from error

    def discard(self) -> None:
        """Close the file and remove the temp if it is still there."""
        if self._writer:
            self._writer.shutdown()
        self._file.discard()


@contextlib.contextmanager
def new_file_at(path: Path, size: int) -> Iterator[NewFile]:
    """A file of `size` bytes outside of a store, published as `path` after the body."""
    try:
        folder = Folder.open(path.parent)
    except OSError as error:
        raise write_error(path, size, error) from error
    with folder, new_file_in(folder, path.name, size) as file:
        yield file


@contextlib.contextmanager
def new_file_in(folder: Folder, name: str, size: int) -> Iterator[NewFile]:
    """As `new_file_at`, in an open directory."""
    file = NewFile(folder, name_beside(name), size, 0o666)
    try:
        yield file
        file.publish(folder, name)
    finally:
        file.discard()


def _past_the_cache(fd: int) -> bool:
    return bool(_DIRECT and fcntl.fcntl(fd, fcntl.F_GETFL) & _DIRECT)


def _through_the_cache(fd: int) -> None:
    """Takes O_DIRECT back: the end of a file is no whole block."""
    if _past_the_cache(fd):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_DIRECT)
