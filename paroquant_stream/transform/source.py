"""The bytes that one unit reads: its shard and the parts borrowed from other shards.

A unit that hashes the shard too reads each tensor once, where its steps take them in file order.
All else that is read of the shard gets a fingerprint (XXH3), which must be that of the bytes in the
hash. So an entry is stored only under the hash of the bytes that it was made from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import xxhash

from ..checkpoint.shard import Shard
from ..errors import SourceChangedError
from ..files.descriptor import file_status
from ..files.hashing import CHUNK, Range, SourceDigest, SourceHasher, read_into, sha256_of
from ..files.page_memory import page_aligned
from ..plan.task import Part
from ..trace import NO_TRACE, Trace
from .unit import Unit

_Key = TypeVar("_Key")
Tick = Callable[[int], None]
"""Called with the number of source bytes just processed; it raises to cancel the unit."""


class Buffers:
    """Two buffers that units read into, reused from unit to unit.

    Reusing them avoids a page fault for every fresh page of every tensor.
    """

    def __init__(self) -> None:
        self._buffers = [memoryview(b""), memoryview(b"")]

    def take(self, index: int, size: int) -> memoryview:
        """Return the first bytes of a buffer, grown if it is too small.

        Args:
            index: Which buffer, 0 or 1. What it held before is overwritten.
            size: How many bytes.
        """
        if len(self._buffers[index]) < size:
            self._buffers[index] = page_aligned(size)  # a bytearray would be zeroed twice
        return self._buffers[index][:size]


class Source:
    """Reads and hashes the shards of one unit, by pread and never through a memory map."""

    def __init__(
        self, unit: Unit, tick: Tick, buffers: Buffers | None = None, trace: Trace = NO_TRACE
    ) -> None:
        """Open the unit's shard.

        Args:
            unit: What is converted.
            tick: Progress callback.
            buffers: Memory to read into; by default new.
            trace: Gets the time of each stage.

        Raises:
            CheckpointError: The shard cannot be opened.
        """
        self._unit, self._tick, self._trace = unit, tick, trace
        self._buffers = buffers or Buffers()
        self._fds: dict[str, int] = {}
        self._paths: dict[str, str] = {}
        self._hasher: SourceHasher | None = None
        self._cache = unit.store.digest_cache
        self.read: dict[Range, bytes] = {}
        """The XXH3-128 of what was read of the shard, apart from its hash."""
        self.borrowed: dict[str, bytes] = {}
        """The SHA-256 of each borrowed tensor that was read."""
        if unit.hashed is not None:
            fd, label = self._fd(unit.shard), self._path(unit.shard)
            try:
                self._seen = self._cache.begin(fd)
                size = file_status(fd, label).st_size
            except BaseException:
                self.close()
                raise
            self._hasher = SourceHasher(fd, unit.hashed, size, label, tick)

    def finish_hash(self) -> SourceDigest | None:
        """Hash the rest of the shard, and remember its SHA-256, if this unit hashes it."""
        if self._hasher is None:
            return None
        with self._trace.span("hash", self._unit.shard):
            digest = self._hasher.finish()
        name = Shard(self._unit.shard, Path(self._path(self._unit.shard))).hub_sha256
        self._cache.remember(self._fd(self._unit.shard), self._seen, digest.sha256, name)
        return digest

    def whole(self, part: Part, buffer: int = 0) -> memoryview:
        """Read all bytes of a part, owned or borrowed.

        Args:
            part: What is read.
            buffer: Which of the buffers to use, 0 or 1.

        Returns:
            The bytes, valid until the next call with the same buffer.

        Raises:
            SourceChangedError: The part was read before and had other bytes.
            MalformedFileError: The shard ends too early.
        """
        size = part.stop - part.start
        self._hash_up_to(part)
        data = self._read(part, part.start, self._buffers.take(buffer, size))
        if part.shard != self._unit.shard:
            self._record(self.borrowed, part.name, sha256_of(data), part)
        elif not self._hash_if_next(data, part.start):
            self._record(self.read, (part.start, part.stop), xxhash.xxh3_128_digest(data), part)
        return data

    def chunks(self, part: Part, multiple: int = 1) -> Iterator[memoryview]:
        """Read an owned part in chunks of at most about 4 MiB.

        Args:
            part: What is read.
            multiple: The size of each chunk is a multiple of this many bytes.

        Yields:
            The next bytes, valid until the next chunk.

        Raises:
            SourceChangedError: The part was read before and had other bytes.
            MalformedFileError: The shard ends too early.
        """
        fingerprint, position, hashed = xxhash.xxh3_128(), part.start, True
        size = max(CHUNK // multiple, 1) * multiple
        self._hash_up_to(part)
        while position < part.stop:
            buffer = self._buffers.take(0, min(size, part.stop - position))
            chunk = self._read(part, position, buffer)
            if not self._hash_if_next(chunk, position):
                fingerprint.update(chunk)
                hashed = False
            position += len(chunk)
            yield chunk
        if not hashed:
            self._record(self.read, (part.start, part.stop), fingerprint.digest(), part)

    def close(self) -> None:
        """Close every shard."""
        while self._fds:
            with suppress(OSError):  # the descriptors were only read from
                os.close(self._fds.popitem()[1])

    def _read(self, part: Part, start: int, buffer: memoryview) -> memoryview:
        """Fill `buffer` with the part's bytes from `start` on."""
        with self._trace.span("read", part.name):
            read_into(self._fd(part.shard), buffer, start, self._path(part.shard))
        return buffer

    def _hash_up_to(self, part: Part) -> None:
        """Hash the bytes before an owned part, so that one read serves hash and conversion."""
        if part.shard == self._unit.shard and self._hasher:
            self._hasher.advance(part.start)

    def _hash_if_next(self, data: memoryview, start: int) -> bool:
        """Hash the bytes read at `start` if they are the next ones of the shard."""
        is_next = self._hasher is not None and self._hasher.position == start
        if self._hasher and is_next:
            with self._trace.span("hash"):
                self._hasher.update(data)
        self._tick(len(data) * (2 if is_next else 1))
        return is_next

    def _path(self, shard: str) -> str:
        if shard not in self._paths:  # thousands of experts lie in one shard
            self._paths[shard] = str(self._unit.directory / shard)
        return self._paths[shard]

    def _fd(self, shard: str) -> int:
        if shard not in self._fds:
            self._fds[shard] = Shard(shard, Path(self._path(shard))).open()
        return self._fds[shard]

    def _record(self, known: dict[_Key, bytes], key: _Key, digest: bytes, part: Part) -> None:
        if known.setdefault(key, digest) != digest:
            raise SourceChangedError(
                f"{self._path(part.shard)}: {part.name} changed while it was read"
            )
