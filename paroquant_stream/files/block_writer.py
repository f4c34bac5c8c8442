"""Writes at any offsets of a file, in full blocks, by a second thread and past the page cache.

O_DIRECT costs less CPU time and evicts nothing from the page cache; where the file system, or a
block that is no multiple of a disk block, does not allow it, the bytes are written without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..trace import NO_TRACE, Trace
from .atomic_file import write_error
from .descriptor import bypass_cache
from .page_memory import page_aligned

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

BLOCK = 4 << 20  # bytes per write
PENDING = 3  # blocks that may wait to be written
_STREAMS = 3  # places that are written in turn, as the outputs of a quantized embedding
_LARGE = 256 << 10  # bytes that are worth a call
_DISK_BLOCK = 4096  # bytes; O_DIRECT takes multiples of it
_DIRECT = getattr(os, "O_DIRECT", 0)
_IN_CACHE = not hasattr(fcntl, "F_NOCACHE")  # where what is written without O_DIRECT goes


class BlockWriter:
    """Collects bytes into blocks, a block for each place that is being written."""

    def __init__(
        self,
        fd: int,
        reopen: Callable[[int], int],
        path: Path,
        size: int,
        trace: Trace = NO_TRACE,
    ) -> None:
        """Start with nothing written.

        Args:
            fd: The file, open for writing; stays the caller's.
            reopen: Opens the same file once more with these flags.
            path: Its path, for errors.
            size: The most bytes that will be written.
            trace: Records the stage `write`.
        """
        self._fd, self._reopen, self._path, self._size = fd, reopen, path, size
        self._trace = trace
        self._direct_fd: int | None = None if _DIRECT and size >= BLOCK else -1
        if size >= BLOCK:
            bypass_cache(fd)
        self._blocks: dict[int, tuple[memoryview, int]] = {}  # next offset: block, bytes in it
        self._free: list[memoryview] = []
        self._thread: ThreadPoolExecutor | None = None
        self._is_inline = size <= BLOCK  # no other block is filled meanwhile
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        self.written = 0
        """Bytes that the system has taken."""

    def write(self, chunk: memoryview, offset: int) -> None:
        """Write bytes, or keep them until their block is full.

        Args:
            chunk: The bytes; they are copied, so the buffer can be reused.
            offset: Where they go.

        Raises:
            StoreError: These or earlier bytes cannot be written.
        """
        chunk = chunk.cast("B")
        is_copied = _IN_CACHE and self._direct_fd == -1 and offset not in self._blocks
        if is_copied and len(chunk) >= _LARGE:  # the page cache takes it at the speed of a copy
            self._write(chunk, offset)
            return
        while chunk:
            if offset not in self._blocks:
                self._blocks[offset] = self._take_block(), 0
            block, filled = self._blocks.pop(offset)
            count = min(len(block) - filled, len(chunk))
            block[filled : filled + count] = chunk[:count]
            offset, filled, chunk = offset + count, filled + count, chunk[count:]
            if filled == len(block):
                self._submit(block, filled, offset)
            else:
                self._blocks[offset] = block, filled

    def _take_block(self) -> memoryview:
        """Return page-aligned memory, as O_DIRECT requires, for a block."""
        if len(self._blocks) == _STREAMS:
            offset, (block, filled) = next(iter(self._blocks.items()))
            del self._blocks[offset]
            self._submit(block, filled, offset)
        self._wait(len(self._pending) - PENDING + 1)
        if self._free:
            return self._free.pop()
        return page_aligned(min(BLOCK, self._size))

    def _submit(self, block: memoryview, filled: int, end: int) -> None:
        """Queue a block that ends at this offset for the thread that writes."""
        if not self._is_inline:
            if self._thread is None:
                # imported late: a run without work does not need it
                from concurrent.futures import ThreadPoolExecutor

                self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
            try:
                future = self._thread.submit(self._write, block[:filled], end - filled)
            except RuntimeError:  # the system starts no more threads, or the program is ending
                self._wait(len(self._pending))
                self._is_inline = True
            else:
                self._pending.append((future, block))
                return
        self._write(block[:filled], end - filled)
        self._free.append(block)

    def _wait(self, count: int) -> None:
        """Wait until the oldest `count` blocks are written; raise what writing them raised."""
        for _ in range(count):
            future, block = self._pending.popleft()
            future.result()
            self._free.append(block)

    def flush(self) -> None:
        """Write what is kept, and wait until all is written.

        Raises:
            StoreError: It cannot be written.
        """
        self._wait(len(self._pending))
        while self._blocks:
            offset, (block, filled) = self._blocks.popitem()
            self._write(block[:filled], offset - filled)
            self._free.append(block)

    def close(self) -> None:
        """Wait for the block that is being written, and give its memory and descriptor back."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        if self._direct_fd not in (None, -1):
            with contextlib.suppress(OSError):  # every write has returned
                os.close(self._direct_fd)
            self._direct_fd = -1

    def _write(self, block: memoryview, offset: int) -> None:
        """Write a block in the calling thread."""
        with self._trace.span("write"):
            try:
                while block:
                    count = self._write_some(block, offset)
                    self.written += count
                    offset, block = offset + count, block[count:]
            except OSError as error:
                raise write_error(self._path, self._size - self.written, error) from error

    def _write_some(self, block: memoryview, offset: int) -> int:
        """Write as much of a block as one call takes, and return the number of bytes."""
        # offsets in a block keep its alignment in memory, as blocks begin on a page
        if not (len(block) | offset) % _DISK_BLOCK and (fd := self._open_direct()) >= 0:
            try:
                return os.pwrite(fd, block, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct_fd = -1
                os.close(fd)
        return os.pwrite(self._fd, block, offset)

    def _open_direct(self) -> int:
        """Return a descriptor with O_DIRECT, or -1 where the file system has none."""
        if self._direct_fd is None:
            try:
                self._direct_fd = self._reopen(os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | _DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct_fd = -1
        return self._direct_fd
