"""Whether a manifest still holds for a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from ..checkpoint.shard import Shard
from ..errors import ParoquantStreamError
from ..files.descriptor import closing
from ..files.digest_cache import DigestCache
from ..store.format import TRANSFORM
from ..store.manifest import EntryRecord, Manifest
from .request import Request

if TYPE_CHECKING:  # a run without work needs no plan
    from ..plan.task import Task

Needed = Callable[[Manifest], Collection[EntryRecord]]
"""The entries of a manifest from which a part of the model is read."""


def staleness(
    request: Request,
    manifest: Manifest,
    read_unknown: bool = False,
    needed: Needed | None = None,
) -> str | None:
    """Tell why a manifest does not hold for the model as it is now, or None when it surely does.

    Args:
        request: The model.
        manifest: Of an earlier conversion.
        read_unknown: Hash a shard whose digest is not remembered; else it counts as changed.
        needed: Of an entry that is not needed, neither it nor its shard must be present; a present
            shard must be the one it was made from, for it may have lent parts.
    """
    if manifest.transform != TRANSFORM:
        return "made by another version"
    if manifest.config_sha256 != request.source.config.sha256:
        return "config.json or the index changed"
    wanted = {record.key for record in (needed(manifest) if needed else manifest.entries)}
    for record in manifest.entries:
        shard = request.source.shard(record.shard)
        may_lack = record.dropped or record.key not in wanted
        if not (may_lack and not os.path.exists(shard.path)):
            reason = source_staleness(
                request.store.digest_cache, shard, record.source_sha256, read_unknown
            )
            if reason:
                return reason
        if record.key in wanted and request.store.entry_size(record.key) != record.size:
            return f"the entry of {record.shard} is absent or cut short"
    return None


def source_staleness(
    digest_cache: DigestCache, shard: Shard, expected: str, read_unknown: bool = False
) -> str | None:
    """Tell why a shard's SHA-256 is not the expected one, or None when it surely is."""
    if not os.path.exists(shard.path):
        return f"{shard.name} is absent"
    try:
        fd = shard.open()
    except ParoquantStreamError as error:
        return str(error)
    with closing(fd):
        sha256 = shard.known_sha256(digest_cache, fd)
        if sha256 is None and read_unknown:
            sha256 = shard.sha256(digest_cache)
    if sha256 != expected:
        return f"{shard.name} changed, or was never hashed where it lies now"
    return None


def is_done(request: Request, task: Task, known: Mapping[str, EntryRecord]) -> bool:
    """Tell whether a shard is surely as it was when its entry was made; no proof of the opposite.

    Args:
        request: The model.
        task: Of the shard.
        known: The records of earlier runs by shard.
    """
    record, shard = known.get(task.shard), request.source.shard(task.shard)
    return (
        record is not None
        and not request.options.force
        and record.task_sha256 == task.sha256
        and request.store.entry_size(record.key) == record.size
        and source_staleness(request.store.digest_cache, shard, record.source_sha256) is None
    )
