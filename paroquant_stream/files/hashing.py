"""Identities of bytes: SHA-256 of sources and parts, XXH3-128 of entries.

SHA-256 is the Hub's own identity of a shard. XXH3 detects damage, not malice, at a tenth of the
cost.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from ..errors import SourceChangedError
from .descriptor import file_status, unreadable
from .tensor_header import TensorInfo

CHUNK = 4 << 20  # bytes a read; larger ones leave the L2 cache before they are hashed


def read_into(fd: int, view: memoryview, start: int, label: str) -> None:
    """Fills `view` with the bytes from `start` on.

    Raises SourceChangedError when the file ends before, UnreadableFileError when the system cannot read it.
    """
    filled = 0
    while filled < len(view):
        try:
            count = os.preadv(fd, [view[filled:]], start + filled)
        except OSError as error:
            raise unreadable(label, error) from error
        if not count:
            raise SourceChangedError(f"{label}: became shorter while it was read; convert it again")
        filled += count


def read_chunks(
    fd: int, start: int, stop: int, label: str, buffer: memoryview
) -> Iterator[memoryview]:
    """The bytes `start:stop` in order, each chunk a view into `buffer`, which the next one reuses.

    Raises SourceChangedError when the file ends before `stop`.
    """
    while start < stop:
        chunk = buffer[: min(len(buffer), stop - start)]
        read_into(fd, chunk, start, label)
        yield chunk
        start += len(chunk)


@dataclass(frozen=True)
class SourceDigest:
    """What one pass over a shard found."""

    sha256: str
    fingerprints: dict[str, bytes]
    """XXH3-128 of each tensor's bytes, to prove later that those same bytes were converted."""


class SourceHasher:
    """Hashes a file front to back: the bytes it is given as they are read, and the gaps between."""

    def __init__(
        self,
        fd: int,
        tensors: Sequence[TensorInfo],
        size: int,
        label: str,
        tick: Callable[[int], None],
    ) -> None:
        """`tensors` in file order; `tick(bytes)` follows every chunk and may raise to stop."""
        self._fd, self._size, self._label, self._tick = fd, size, label, tick
        self._whole, self._one = hashlib.sha256(), xxhash.xxh3_128()
        self._left = deque(tensor for tensor in tensors if tensor.stop > tensor.start)
        self._fingerprints = {t.name: self._one.digest() for t in tensors if t.stop == t.start}
        self.position = 0

    def update(self, view: memoryview) -> None:
        """Hashes the bytes from `position` on."""
        self._whole.update(view)
        while view:
            if not self._left:
                self.position += len(view)
                return
            tensor = self._left[0]
            inside = self.position >= tensor.start
            chunk = view[: (tensor.stop if inside else tensor.start) - self.position]
            if inside:
                self._one.update(chunk)
            self.position += len(chunk)
            view = view[len(chunk) :]
            if self.position == tensor.stop:
                self._fingerprints[tensor.name] = self._one.digest()
                self._one.reset()
                self._left.popleft()

    def advance(self, stop: int) -> None:
        """Reads and hashes up to `stop`. Raises SourceChangedError when the file ends before."""
        if stop <= self.position:
            return
        buffer = memoryview(bytearray(min(CHUNK, stop - self.position)))
        for chunk in read_chunks(self._fd, self.position, stop, self._label, buffer):
            self.update(chunk)
            self._tick(len(chunk))

    def finish(self) -> SourceDigest:
        """The digest, once the rest of the file is read."""
        self.advance(self._size)
        return SourceDigest(self._whole.hexdigest(), self._fingerprints)


def sha256_of(data: memoryview) -> bytes:
    """SHA-256 of a part that another shard's task borrows, 32 bytes."""
    return hashlib.sha256(data).digest()


def hash_entry(fd: int, label: str) -> str:
    """XXH3-128 of a whole file, in hex."""
    return hash_parts(b"", fd, label)


def hash_parts(head: bytes, fd: int, label: str) -> str:
    """XXH3-128 of `head` and of what follows as many bytes in the file, in hex."""
    digest = xxhash.xxh3_128(head)
    buffer = memoryview(bytearray(CHUNK))
    for chunk in read_chunks(fd, len(head), file_status(fd, label).st_size, label, buffer):
        digest.update(chunk)
    return digest.hexdigest()
