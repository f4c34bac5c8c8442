"""What became of each shard and why; the same words for a run and for a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..store.manifest import EntryRecord, Manifest

UNCHANGED, IN_CACHE = "unchanged", "its content is in the cache already"
IN_MODEL = "converted inside the model directory"
ENTRY_GONE = "its entry is absent or damaged"


@dataclass(frozen=True)
class ShardReport:
    """What became of one shard, or in a dry run what would."""

    shard: str
    action: str
    """`converted` or `reused`."""
    why: str
    key: str | None
    """The entry's key; None in a dry run that would convert."""
    digest: str | None
    bytes_in: int
    """Bytes of the shard."""
    bytes_out: int
    """Bytes of the entry."""
    seconds: float


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    manifest: Manifest
    manifest_path: Path
    shards: tuple[ShardReport, ...]
    seconds: float


def why_converted(
    before: EntryRecord | None,
    source_sha256: str | None,
    borrowed_sha256: Sequence[str],
    task_sha256: str,
    forced: bool,
) -> str:
    """Tell why a shard is converted, from its record in the previous manifest."""
    if forced:
        return "forced"
    if before is None:
        return "never converted"
    if before.source_sha256 != source_sha256:
        return "content changed"
    if before.borrowed_sha256 != tuple(borrowed_sha256):
        return "borrowed part changed"
    if before.task_sha256 != task_sha256:
        return "config, tensors of its linears or transform version changed"
    return ENTRY_GONE


def report_reused(
    record: EntryRecord, before: EntryRecord | None, seconds: float = 0.0
) -> ShardReport:
    """Report a shard whose entry existed."""
    same = before is not None and before.key == record.key
    return _report(record, "reused", UNCHANGED if same else IN_CACHE, seconds)


def report_inside(record: EntryRecord) -> ShardReport:
    """Report an absent shard whose entry lies inside the model directory."""
    return _report(record, "reused", IN_MODEL, 0.0)


def report_converted(
    record: EntryRecord, before: EntryRecord | None, forced: bool, seconds: float
) -> ShardReport:
    """Report a shard that was converted."""
    why = why_converted(
        before, record.source_sha256, record.borrowed_sha256, record.task_sha256, forced
    )
    return _report(record, "converted", why, seconds)


def _report(record: EntryRecord, action: str, why: str, seconds: float) -> ShardReport:
    sizes = (record.source_size, record.size)
    return ShardReport(record.shard, action, why, record.key, record.digest, *sizes, seconds)
