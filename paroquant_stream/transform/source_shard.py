"""The shard of a task as the run sees it: what is known of it, and whether the workers read the
bytes that were hashed.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import xxhash

from ..checkpoint.shard import Shard
from ..errors import MalformedFileError, SourceChangedError, SourceDamagedError
from ..files.descriptor import FileStamp, closing
from ..files.digest_cache import DigestCache
from ..files.hashing import Range, SourceDigest, sha256_of_range
from ..files.tensor_header import read_header, read_header_bytes
from ..plan.task import Part, Task
from ..store.manifest import EntryRecord
from .unit import UnitResult


class SourceShard:
    """A shard, open, and what was read of it."""

    def __init__(self, task: Task, directory: Path, digest_cache: DigestCache) -> None:
        """Open the shard, and check that its header is that of the plan.

        Args:
            task: What is converted.
            directory: Of the model.
            digest_cache: Digests of files that were hashed before.

        Raises:
            CheckpointError: The shard cannot be opened.
            MalformedFileError: Its header is not valid safetensors.
            SourceChangedError: Its header has changed since it was planned.
        """
        self._task, self._directory, self._cache = task, directory, digest_cache
        self._shard = Shard(task.shard, directory / task.shard)
        self._read: dict[Range, bytes] = {}
        self._borrowed: dict[str, bytes] = {}
        self._digest: SourceDigest | None = None
        self._fd = self._shard.open()
        try:
            self._stamp = FileStamp.of_fd(self._fd, str(self._shard.path))
            self.header = self._check_header()
        except BaseException:
            self.close()
            raise

    def _check_header(self) -> Range:
        """Return the range of the header, and note its fingerprint."""
        label = str(self._shard.path)
        data = b""
        if self._stamp.size == self._task.size:
            with suppress(MalformedFileError):  # the comparison says what is wrong
                data = read_header_bytes(self._fd, label)
        if hashlib.sha256(data).digest() != self._task.header_sha256:
            self._compare_header(label)
            data = read_header_bytes(self._fd, label)
        self._read[header := (0, len(data))] = xxhash.xxh3_128_digest(data)
        return header

    def _compare_header(self, label: str) -> None:
        """Check that the tensors of another header are where those of the plan are."""
        found = {tensor.name: tensor for tensor in read_header(self._fd, label).tensors}
        for part in self._task.owned:
            tensor = found.get(part.name)
            if tensor is None or _fields(tensor) != _fields(part):
                raise SourceChangedError(
                    f"{label}: {part.name} is not where it was when the run began; run again"
                )

    def known_sha256(self) -> str | None:
        """Return the shard's SHA-256 if it is known without reading the shard, else None."""
        if self._digest:
            return self._digest.sha256
        return self._shard.known_sha256(self._cache, self._fd)

    def may_be_known(self, known: EntryRecord | None) -> bool:
        """Tell whether these bytes may have been hashed before, so that hashing may save the work.

        Args:
            known: The record of this shard in an earlier manifest, if there is one.
        """
        same_size = known is not None and known.source_size == self._stamp.size
        return self._cache.may_know(self._fd, known.source_sha256 if known and same_size else None)

    @property
    def is_hashed(self) -> bool:
        """Whether a unit of this run has hashed the shard."""
        return self._digest is not None

    def add(self, result: UnitResult) -> None:
        """Note what a unit has read.

        Raises:
            SourceChangedError: Another unit has read other bytes at the same place.
        """
        self._digest = result.digest or self._digest
        for place, digest in result.read:
            if self._read.setdefault(place, digest) != digest:
                raise self._changed(self._name_of(place))
        for name, digest in result.borrowed:
            if self._borrowed.setdefault(name, digest) != digest:
                raise self._changed(name)

    def borrowed_sha256(self) -> list[str]:
        """Return one SHA-256 for each shard with borrowed parts, over the digests of these parts.

        Parts that no unit has read are read.

        Raises:
            CheckpointError: A shard that lends them cannot be read.
        """
        for shard, parts in self._task.borrowed.items():
            missing = [part for part in parts if part.name not in self._borrowed]
            if missing:
                path = self._directory / shard
                with closing(Shard(shard, path).open()) as fd:
                    for part in missing:
                        place = part.start, part.stop
                        self._borrowed[part.name] = sha256_of_range(fd, place, str(path))
        return self._task.borrowed_sha256(self._borrowed)

    def check(self) -> str:
        """Check that the bytes that were read are those that were hashed.

        Returns:
            The SHA-256 of the shard.

        Raises:
            SourceChangedError: They are not, or the file changed since it was opened.
            SourceDamagedError: The name of the Hub's blob is another SHA-256.
        """
        if self._digest is None:
            raise AssertionError(f"{self._shard.path}: no unit has hashed it")
        hashed, path = self._digest.fingerprints, self._shard.path
        changed = [
            self._name_of(place) for place, d in self._read.items() if hashed.get(place) != d
        ]
        if changed or not self._unchanged():
            raise self._changed(", ".join(changed[:3]) or "its size or times")
        claimed, sha256 = self._shard.hub_sha256, self._digest.sha256
        if claimed not in (None, sha256):
            raise SourceDamagedError(
                f"{path}: expected SHA-256 {claimed} as the Hub names it, found {sha256}; remove "
                f"{os.path.realpath(path)} and run again"
            )
        return sha256

    def close(self) -> None:
        """Close the shard."""
        with suppress(OSError):  # it was only read from
            os.close(self._fd)

    def _changed(self, what: str) -> SourceChangedError:
        return SourceChangedError(
            f"{self._shard.path}: {what} changed during the conversion; convert it again"
        )

    def _name_of(self, place: Range) -> str:
        """Name the tensor that begins at a place, or has it inside."""
        inside = (part.name for part in self._task.owned if part.start <= place[0] < part.stop)
        return next(inside, "its header")

    def _unchanged(self) -> bool:
        return FileStamp.of_fd(self._fd, str(self._shard.path)) == self._stamp


def _fields(tensor: Part | object) -> tuple[object, ...]:
    return tuple(getattr(tensor, name) for name in ("dtype", "shape", "start", "stop"))
