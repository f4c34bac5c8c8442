"""Hashes of files: SHA-256 as the Hub identifies a shard; XXH3, much faster, shows damage alone."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple, TypeVar

import xxhash

from ..errors import SourceChangedError
from .descriptor import file_status, read_some, unreadable
from .page_memory import page_aligned

Range = tuple[int, int]
"""The offset of the first byte in a file and that after the last."""
_Item = TypeVar("_Item")
_MANY = 8  # chunks that are worth a thread
CHUNK = 4 << 20  # bytes per read; small enough to be hashed while it is in the L2 cache


def read_into(fd: int, view: memoryview, start: int, label: str) -> None:
    """Fill a buffer with the bytes of a file.

    Args:
        fd: The file.
        view: The buffer; its length is the number of bytes to read.
        start: Position of the first byte.
        label: The name of the file in errors.

    Raises:
        SourceChangedError: The file ends before the buffer is full.
        UnreadableFileError: The operating system cannot read it.
    """
    filled = 0
    while filled < len(view):
        try:
            count = read_some(fd, view[filled:], start + filled)
        except OSError as error:
            raise unreadable(label, error) from error
        if not count:
            raise SourceChangedError(f"{label}: became shorter while it was read; convert it again")
        filled += count


def read_chunks(
    fd: int, start: int, stop: int, label: str, *buffers: memoryview
) -> Iterator[memoryview]:
    """Yield the bytes `start:stop` of a file in order, as views into buffers that are reused.

    Args:
        fd: The file.
        start: Position of the first byte.
        stop: Position after the last byte.
        label: The name of the file in errors.
        buffers: Memory for one chunk each, used in turn; each chunk but the last fills one.

    Raises:
        SourceChangedError: The file ends before `stop`.
        UnreadableFileError: The operating system cannot read it.
    """
    turns = cycle(buffers)
    while start < stop:
        chunk = next(turns)[: stop - start]
        read_into(fd, chunk, start, label)
        yield chunk
        start += len(chunk)


def one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield what an iterator yields, none of it None, while another thread takes its next item."""
    from concurrent.futures import ThreadPoolExecutor  # late: a run without work does not need it

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        step = partial(next, items, None)
        item = step()
        while item is not None:
            try:
                future = thread.submit(step)
            except RuntimeError:  # the system starts no more threads, or the program is ending
                yield item
                yield from items  # no thread is asked again: it would first do the refused step
                return
            yield item
            item = future.result()


class SourceDigest(NamedTuple):  # a dataclass takes three times as long to import
    """The hashes from one pass over a shard."""

    sha256: str
    """SHA-256 of the file, in hex."""
    fingerprints: dict[Range, bytes]
    """XXH3-128 of each range, to check that the bytes that were converted are the same."""


class SourceHasher:
    """Hashes a shard and ranges of it in one pass, front to back.

    `update` takes bytes that the caller has read; `advance` reads the bytes between them.
    """

    def __init__(
        self,
        fd: int,
        ranges: Sequence[Range],
        size: int,
        label: str,
        tick: Callable[[int], None],
    ) -> None:
        """Start at the first byte.

        Args:
            fd: The shard.
            ranges: What gets a fingerprint: in file order, none empty or overlapping.
            size: Its length in bytes.
            label: The name of the file in errors.
            tick: Called with the number of bytes after every chunk that is read here; may raise to
                stop.
        """
        self._fd, self._size, self._label, self._tick = fd, size, label, tick
        self._file_hash, self._range_hash = hashlib.sha256(), xxhash.xxh3_128()
        self._remaining = deque(ranges)
        self._fingerprints: dict[Range, bytes] = {}
        self._buffers: list[memoryview] = []
        self.position = 0

    def update(self, view: memoryview) -> None:
        """Hash the bytes that follow `position`, and move it behind them."""
        self._file_hash.update(view)
        self._pass(view)

    def _pass(self, view: memoryview) -> None:
        """Take the fingerprints in the bytes that follow `position`, and move it behind them."""
        while view and self._remaining:
            start, stop = self._remaining[0]
            inside = self.position >= start
            chunk = view[: (stop if inside else start) - self.position]
            if inside:
                self._range_hash.update(chunk)
            self.position += len(chunk)
            view = view[len(chunk) :]
            if self.position == stop:
                self._fingerprints[start, stop] = self._range_hash.digest()
                self._range_hash.reset()
                self._remaining.popleft()
        self.position += len(view)

    def advance(self, stop: int) -> None:
        """Read and hash the bytes from `position` to `stop`; do nothing if it is behind.

        Raises:
            SourceChangedError: The file ends before `stop`.
            UnreadableFileError: The operating system cannot read it.
        """
        chunks = self._read_up_to(stop)
        # SHA-256 takes most of the time: all else is done for the next chunk meanwhile
        for chunk in one_ahead(chunks) if stop - self.position >= _MANY * CHUNK else chunks:
            self._file_hash.update(chunk)
            self._tick(len(chunk))

    def _read_up_to(self, stop: int) -> Iterator[memoryview]:
        """Read the bytes from `position` to `stop` and take their fingerprints.

        Yields:
            The next bytes, valid until the next but one.
        """
        size = stop - self.position
        if size <= 0:
            return
        count = 2 if size > CHUNK else 1
        while len(self._buffers) < count:  # kept, as experts leave thousands of gaps between them
            self._buffers.append(page_aligned(min(CHUNK, self._size)))
        buffers = self._buffers[:count]
        for chunk in read_chunks(self._fd, self.position, stop, self._label, *buffers):
            self._pass(chunk)
            yield chunk

    def finish(self) -> SourceDigest:
        """Read and hash the rest of the file and return the hashes.

        Raises:
            SourceChangedError: The file is shorter than it was.
            UnreadableFileError: The operating system cannot read it.
        """
        self.advance(self._size)
        return SourceDigest(self._file_hash.hexdigest(), self._fingerprints)


def sha256_of(data: memoryview) -> bytes:
    """Return the SHA-256 of bytes in memory, 32 bytes."""
    return hashlib.sha256(data).digest()


def sha256_of_range(fd: int, bounds: Range, label: str) -> bytes:
    """Read a range of a file into memory and return its SHA-256, 32 bytes.

    Args:
        fd: The file.
        bounds: The range.
        label: The name of the file in errors.

    Raises:
        SourceChangedError: The file ends before the range does.
        UnreadableFileError: The operating system cannot read it.
    """
    data = memoryview(bytearray(bounds[1] - bounds[0]))
    read_into(fd, data, bounds[0], label)
    return sha256_of(data)


def hash_parts(head: bytes, fd: int, label: str) -> str:
    """Return the XXH3-128 of a file whose first bytes are replaced, in hex.

    Args:
        head: Hashed in place of as many bytes at the beginning of the file.
        fd: The file.
        label: The name of the file in errors.

    Raises:
        SourceChangedError: The file became shorter meanwhile.
        UnreadableFileError: The operating system cannot read it.
    """
    digest = xxhash.xxh3_128(head)
    buffer = memoryview(bytearray(CHUNK))
    for chunk in read_chunks(fd, len(head), file_status(fd, label).st_size, label, buffer):
        digest.update(chunk)
    return digest.hexdigest()
