"""The bytes that one task reads: its shard and the parts borrowed from other shards.

The shard is hashed in file order and converted in the entry's order, since the entry is hashed
front to back as well. The two orders agree except for small tensors; where they agree, one read
serves both. Bytes that are read twice must have the same fingerprint (XXH3) both times. So an entry
is stored only under the hash of the bytes that it was made from. If a second slot is idle, helper
threads hash the shard while it is converted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoint.shard import Shard
from ..errors import RunCancelledError, SourceChangedError, SourceDamagedError
from ..execution.slots import Slot
from ..files.descriptor import FileStamp
from ..files.digest_cache import DigestCache
from ..files.hashing import CHUNK, SourceDigest, SourceHasher, read_into, sha256_of
from ..files.tensor_header import read_header
from ..plan.task import Part, Task

Tick = Callable[[int], None]
"""Called with the number of source bytes just processed; it raises to cancel the task."""


class Source:
    """Reads and hashes the shards of one task, by pread and never through a memory map.

    Nothing is read before a method asks for it, except the shard's header.
    """

    def __init__(
        self,
        task: Task,
        directory: Path,
        digest_cache: DigestCache,
        tick: Tick,
        slot: Slot | None = None,
    ) -> None:
        """Open the task's shard.

        Args:
            task: What is converted.
            directory: Of the model.
            digest_cache: Digests of files that were hashed before.
            tick: Progress callback.
            slot: The slot of the job; by default one of its own.

        Raises:
            CheckpointError: The shard cannot be opened.
            MalformedFileError: Its header is not valid safetensors.
        """
        self._slot = slot or Slot()
        self._task, self._directory, self._digest_cache, self._tick = (
            task,
            directory,
            digest_cache,
            tick,
        )
        self._shard = Shard(task.shard, directory / task.shard)
        self._fds: dict[str, int] = {}
        self._fingerprints: dict[str, bytes] = {}
        self._borrowed: dict[str, bytes] = {}
        self._digest: SourceDigest | None = None
        self._stopped = self._hashed_by_helper = False
        self.parallel_map: Callable[..., Iterator[Any]] = map
        """`map`, or that of the helper threads while there are some."""
        fd, label = self._fd(task.shard), str(self._path())
        try:
            self._stamp, self._seen = FileStamp.of_fd(fd, label), digest_cache.begin(fd)
            tensors = read_header(fd, label).tensors
        except BaseException:
            self.close()
            raise
        self._hasher = SourceHasher(fd, tensors, self._stamp.size, label, self._count)

    def known_sha256(self) -> str | None:
        """Return the shard's SHA-256 if it is known without reading the shard, else None."""
        if self._digest:
            return self._digest.sha256
        return self._shard.known_sha256(self._digest_cache, self._fd(self._task.shard))

    def may_be_known(self) -> bool:
        """Tell whether a file of this size was hashed before, so that hashing may save the work."""
        return self._digest_cache.knows_size(self._stamp.size)

    def hash(self) -> SourceDigest:
        """Hash the rest of the shard: its SHA-256 and the fingerprint of each tensor."""
        if self._digest is None:
            with self._slot.trace.span("hash", self._task.shard):
                self._digest = self._hasher.finish()
            sha256, name = self._digest.sha256, self._shard.hub_sha256
            self._digest_cache.remember(self._fd(self._task.shard), self._seen, sha256, name)
        return self._digest

    @contextmanager
    def hashed_by(self, pool: Executor) -> Iterator[None]:
        """Hash the shard in a helper thread while the body runs; wait for it at the end.

        Args:
            pool: The helper threads; `parallel_map` uses those that do not hash.
        """
        self._hashed_by_helper, self.parallel_map = True, pool.map
        hashed = pool.submit(self.hash)
        try:
            yield
        except BaseException:
            self._stopped = True  # else the pool's shutdown waits until the whole shard is hashed
            raise
        hashed.result()

    def whole(self, part: Part, buffer: int = 0) -> memoryview:
        """Read all bytes of a part, owned or borrowed.

        Args:
            part: What is read.
            buffer: Which of the slot's buffers to use, 0 or 1.

        Returns:
            The bytes, valid until the next call with the same buffer.

        Raises:
            SourceChangedError: The part was read before and had other bytes.
            MalformedFileError: The shard ends too early.
        """
        size = part.stop - part.start
        self._hash_up_to(part)
        data = self._read(part, part.start, self._slot.buffers.take(buffer, size))
        if part.shard != self._task.shard:
            self._record_digest(self._borrowed, part, sha256_of(data))
        elif not self._hash_if_next(data, part.start):
            self._record_digest(self._fingerprints, part, xxhash.xxh3_128(data).digest())
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
            buffer = self._slot.buffers.take(0, min(size, part.stop - position))
            chunk = self._read(part, position, buffer)
            fingerprint.update(chunk)
            hashed &= self._hash_if_next(chunk, position)
            position += len(chunk)
            yield chunk
        if not hashed:
            self._record_digest(self._fingerprints, part, fingerprint.digest())

    def _read(self, part: Part, start: int, buffer: memoryview) -> memoryview:
        """Fill `buffer` with the part's bytes from `start` on."""
        with self._slot.trace.span("read", part.name):
            read_into(self._fd(part.shard), buffer, start, str(self._path(part.shard)))
        return buffer

    def _hash_up_to(self, part: Part) -> None:
        """Hash the bytes before an owned part, so that one read serves hash and conversion."""
        if part.shard == self._task.shard and not self._hashed_by_helper:
            self._hasher.advance(part.start)

    def _hash_if_next(self, data: memoryview, start: int) -> bool:
        """Hash the bytes read at `start` if they are the next ones of the shard."""
        at_position = self._hasher.position == start and self._digest is None
        is_next = not self._hashed_by_helper and at_position
        if is_next:
            with self._slot.trace.span("hash"):
                self._hasher.update(data)
        self._count(len(data) * (2 if is_next else 1))
        return is_next

    def borrowed_sha256(self) -> list[str]:
        """Return one SHA-256 for each shard with borrowed parts, over the digests of these parts.

        Parts that were not read yet are read.
        """
        for parts in self._task.borrowed.values():
            for part in parts:
                if part.name not in self._borrowed:
                    self.whole(part)
        return self._task.borrowed_sha256(self._borrowed)

    def check(self) -> str:
        """Check that the parts read are the bytes that were hashed.

        Returns:
            The SHA-256 of the shard.

        Raises:
            SourceChangedError: They are not, or the file changed since it was opened.
            SourceDamagedError: The name of the Hub's blob is another SHA-256.
        """
        digest = self.hash()
        changed = [
            name
            for name, seen in self._fingerprints.items()
            if digest.fingerprints.get(name) != seen
        ]
        if changed or not self._unchanged():
            what = ", ".join(changed[:3]) or "its size or times"
            raise SourceChangedError(
                f"{self._path()}: {what} changed during the conversion; convert it again"
            )
        claimed = self._shard.hub_sha256
        if claimed not in (None, digest.sha256):
            raise SourceDamagedError(
                f"{self._path()}: expected SHA-256 {claimed} as the Hub names it, found "
                f"{digest.sha256}; remove {os.path.realpath(self._path())} and run again"
            )
        return digest.sha256

    def close(self) -> None:
        """Close every shard."""
        while self._fds:
            with suppress(OSError):  # the descriptors were only read from
                os.close(self._fds.popitem()[1])

    def _path(self, shard: str | None = None) -> Path:
        return self._directory / (shard or self._task.shard)

    def _fd(self, shard: str) -> int:
        if shard not in self._fds:
            self._fds[shard] = Shard(shard, self._path(shard)).open()
        return self._fds[shard]

    def _count(self, size: int) -> None:
        if self._stopped:
            raise RunCancelledError("stopped with the conversion")
        self._tick(size)

    def _unchanged(self) -> bool:
        stamp = FileStamp.of_fd(self._fd(self._task.shard), str(self._path()))
        return stamp == self._stamp

    def _record_digest(self, known: dict[str, bytes], part: Part, digest: bytes) -> None:
        if known.setdefault(part.name, digest) != digest:
            raise SourceChangedError(
                f"{self._path(part.shard)}: {part.name} changed while it was read"
            )
