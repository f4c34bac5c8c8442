"""One task's sources while it runs: its shard, those it borrows from, and proof of what was read.

The shard is hashed in file order and converted in the entry's order, since the entry is hashed
front to back as well. Where the two orders agree, and they do but for small tensors, one read
serves both; what is read again must have the fingerprint (XXH3) of the bytes that were hashed. So
an entry is filed only under the hash of the very bytes that it was made from. With a thread to
spare, the hash runs beside the conversion.
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
from ..execution.slots import Worker
from ..files.descriptor import FileStamp
from ..files.digest_cache import DigestCache
from ..files.hashing import CHUNK, SourceDigest, SourceHasher, read_into, sha256_of
from ..files.tensor_header import read_header
from ..plan.task import Part, Task

Tick = Callable[[int], None]
"""Called with a number of source bytes just done; raises to stop the work."""


class Source:
    """The bytes a task converts, read by pread on one descriptor a shard, never mapped."""

    def __init__(
        self,
        task: Task,
        directory: Path,
        digest_cache: DigestCache,
        tick: Tick,
        worker: Worker | None = None,
    ) -> None:
        self._worker = worker or Worker()
        self._task, self._directory, self._tick = task, directory, tick
        self._digest_cache = digest_cache
        self._shard = Shard(task.shard, directory / task.shard)
        self._fds: dict[str, int] = {}
        self._fingerprints: dict[str, bytes] = {}
        self._borrowed: dict[str, bytes] = {}
        self._digest: SourceDigest | None = None
        self._stopped = self._beside = False
        self.spread: Callable[..., Iterator[Any]] = map
        """`map`, or one that works on several items at once."""
        fd, label = self._fd(task.shard), str(self._path())
        try:
            self._stamp, self._seen = FileStamp.of_fd(fd, label), digest_cache.begin(fd)
            tensors = read_header(fd, label).tensors
        except BaseException:
            self.close()
            raise
        self._hasher = SourceHasher(fd, tensors, self._stamp.size, label, self._count)

    def known_sha256(self) -> str | None:
        """The shard's SHA-256 if that is known without reading it through."""
        if self._digest:
            return self._digest.sha256
        return self._shard.known_sha256(self._digest_cache, self._fd(self._task.shard))

    def may_be_known(self) -> bool:
        """Whether the store has seen a shard of this size: hashing first may save the work."""
        return self._digest_cache.knows_size(self._stamp.size)

    def hash(self) -> SourceDigest:
        """SHA-256 of the shard and the fingerprint of each of its tensors, once."""
        if self._digest is None:
            with self._worker.trace.span("hash", self._task.shard):
                self._digest = self._hasher.finish()
            sha256, name = self._digest.sha256, self._shard.hub_sha256
            self._digest_cache.remember(self._fd(self._task.shard), self._seen, sha256, name)
        return self._digest

    @contextmanager
    def hashing_beside(self, pool: Executor) -> Iterator[None]:
        """Hashes the shard in a thread of `pool` beside the body, done when the body is; `spread`
        uses the others.
        """
        self._beside, self.spread = True, pool.map
        hashed = pool.submit(self.hash)
        try:
            yield
        except BaseException:
            self._stopped = True  # else leaving the pool waits for a whole shard
            raise
        hashed.result()

    def whole(self, part: Part, slot: int = 0) -> memoryview:
        """All bytes of a part, valid until the next call with the same `slot` (0 or 1)."""
        size = part.stop - part.start
        self._reach(part)
        data = self._read(part, part.start, self._worker.buffers.take(slot, size))
        if part.shard != self._task.shard:
            self._note(self._borrowed, part, sha256_of(data))
        elif not self._hash_now(data, part.start):
            self._note(self._fingerprints, part, xxhash.xxh3_128(data).digest())
        return data

    def chunks(self, part: Part, multiple: int = 1) -> Iterator[memoryview]:
        """The bytes of an owned part in chunks, each a multiple of `multiple` bytes.

        A chunk is valid until the next.
        """
        fingerprint, position, hashed = xxhash.xxh3_128(), part.start, True
        size = max(CHUNK // multiple, 1) * multiple
        self._reach(part)
        while position < part.stop:
            buffer = self._worker.buffers.take(0, min(size, part.stop - position))
            chunk = self._read(part, position, buffer)
            fingerprint.update(chunk)
            hashed &= self._hash_now(chunk, position)
            position += len(chunk)
            yield chunk
        if not hashed:
            self._note(self._fingerprints, part, fingerprint.digest())

    def _read(self, part: Part, start: int, buffer: memoryview) -> memoryview:
        """Fills `buffer` with the part's bytes from `start` on."""
        with self._worker.trace.span("read", part.name):
            read_into(self._fd(part.shard), buffer, start, str(self._path(part.shard)))
        return buffer

    def _reach(self, part: Part) -> None:
        """Hashes up to an owned part, so that one read of it serves both hash and conversion."""
        if part.shard == self._task.shard and not self._beside:
            self._hasher.advance(part.start)

    def _hash_now(self, data: memoryview, start: int) -> bool:
        """Hashes the bytes just read at `start`, if it is their turn."""
        now = not self._beside and self._hasher.position == start and self._digest is None
        if now:
            with self._worker.trace.span("hash"):
                self._hasher.update(data)
        self._count(len(data) * (2 if now else 1))
        return now

    def borrowed_sha256(self) -> list[str]:
        """One SHA-256 for each lending shard; reads the borrowed parts that were not read yet."""
        for parts in self._task.borrowed.values():
            for part in parts:
                if part.name not in self._borrowed:
                    self.whole(part)
        return self._task.borrowed_sha256(self._borrowed)

    def check(self) -> str:
        """The SHA-256 of the shard, once it is sure that the parts read are the bytes that were
        hashed.

        Raises SourceChangedError when they are not, or when the file changed since it was opened;
        SourceDamagedError when the Hub's blob name claims another SHA-256.
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
        """Closes every shard."""
        while self._fds:
            with suppress(OSError):  # they were only read
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

    def _note(self, seen: dict[str, bytes], part: Part, digest: bytes) -> None:
        if seen.setdefault(part.name, digest) != digest:
            raise SourceChangedError(
                f"{self._path(part.shard)}: {part.name} changed while it was read"
            )
