"""Whether a converted model still holds, shard by shard, from headers, stat and digest cache.

No shard is read: one whose digest is not remembered is `unknown`. The words are those of
`convert --dry-run`, which reads what it must.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.model_source import ModelSource
from ..checkpoint.shard import Shard
from ..conversion.report import ENTRY_GONE, IN_CACHE, UNCHANGED, why_converted
from ..conversion.request import Request, Target
from ..conversion.staleness import staleness
from ..errors import ParoquantStreamError
from ..files.descriptor import FileStamp
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from .models import Model

if TYPE_CHECKING:
    from ..plan.task import Task

FRESH, STALE, UNKNOWN, BROKEN = "fresh", "stale", "unknown", "broken"
ORPHAN, DAMAGED = "orphan", "damaged"
_INTERRUPTED = "a conversion with --drop-source was interrupted; run it again"
NOT_REMEMBERED = "too new when it was converted to be proved unchanged; `convert` proves it"


@dataclass(frozen=True)
class ShardState:
    """Whether a shard would be converted, and why."""

    shard: str
    state: str
    """`fresh`, `stale` or `unknown`."""
    why: str
    key: str | None
    """The entry that the manifest names; None for a shard that it does not name."""
    bytes_in: int
    """Bytes of the shard."""
    bytes_out: int
    """Bytes of the entry; 0 when it is absent."""
    dropped: bool
    """Whether the shard was removed on purpose."""

    @property
    def is_converted(self) -> bool:
        """Whether its entry exists and is not known to be out of date."""
        return self.state != STALE and self.bytes_out > 0


@dataclass(frozen=True)
class Freshness:
    """Whether a model would be converted again, as a whole and shard by shard."""

    state: str
    """`fresh`, `stale`, `unknown` or `broken`; in a listing also `orphan` and `damaged`."""
    why: str
    """Empty when fresh."""
    shards: tuple[ShardState, ...]


def freshness_of(store: Store, model: Model) -> Freshness:
    """Tell whether a model of a store would be converted again; reads its directory."""
    manifest, directory = model.manifest, model.directory
    if model.moved and manifest:
        why = "its directory was moved or holds another model, and the model loads where it is now"
        return Freshness(ORPHAN, why, entries_alone(store, manifest, why))
    if model.is_record and manifest:
        return Freshness(STALE, _INTERRUPTED, entries_alone(store, manifest, _INTERRUPTED))
    if manifest is None:
        if model.newer:
            return Freshness(UNKNOWN, "of a newer version, or not readable", ())
        if model.records:
            return Freshness(STALE, _INTERRUPTED, ())
        return Freshness(DAMAGED, "the next conversion replaces it", ())
    if directory is None:
        why = "made by an older version, which did not record where the model lies"
        return Freshness(UNKNOWN, why, entries_alone(store, manifest, why))
    if model.is_orphan:
        why = f"{directory} is gone"
        return Freshness(ORPHAN, why, entries_alone(store, manifest, why))
    target = Target(store, in_place=not store.private, variant=model.variant)
    return examine(Request(ModelSource(str(directory), directory), target), manifest)


def examine(request: Request, manifest: Manifest) -> Freshness:
    """Compare a model with its manifest; a model that cannot be read is `broken`."""
    known = {record.shard: record for record in manifest.entries}
    try:
        reason = staleness(request, manifest)
        if reason is None:
            states = [_state(request.store, r, FRESH, UNCHANGED) for r in known.values()]
            return Freshness(FRESH, "", tuple(states))
        from ..conversion.planning import plan_model  # for models that changed alone

        plan = plan_model(request).plan
    except ParoquantStreamError as error:
        why = str(error).partition("\n")[0]
        return Freshness(BROKEN, why, entries_alone(request.store, manifest, "see its model"))
    known_shards = _KnownShards(request, known)
    shards = tuple(known_shards.look(task) for task in plan.tasks)
    return Freshness(*_sum_up(shards, reason), shards)


def entries_alone(store: Store, manifest: Manifest, why: str) -> tuple[ShardState, ...]:
    """Return the states of a model whose directory cannot be read: absent entries are stale."""
    return tuple(
        _state(store, record, UNKNOWN, why)
        if store.entry_size(record.key) == record.size
        else _state(store, record, STALE, ENTRY_GONE)
        for record in manifest.entries
    )


def _sum_up(shards: tuple[ShardState, ...], reason: str) -> tuple[str, str]:
    for state in (STALE, UNKNOWN):
        reasons = [shard.why for shard in shards if shard.state == state]
        if reasons:
            counts = {why: reasons.count(why) for why in dict.fromkeys(reasons)}
            return state, ", ".join(f"{why} ({count})" for why, count in counts.items())
    return STALE, reason  # the manifest is to be written again, no shard


def _state(store: Store, record: EntryRecord, state: str, why: str) -> ShardState:
    size = store.entry_size(record.key) or 0
    return ShardState(
        record.shard, state, why, record.key, record.source_size, size, record.dropped
    )


class _KnownShards:
    """What is known of a model's shards without reading them."""

    def __init__(self, request: Request, known: Mapping[str, EntryRecord]) -> None:
        self._request, self._known = request, known
        self._digests: dict[str, str | None] = {}

    def look(self, task: Task) -> ShardState:
        """Return the state of the task's shard."""
        record, store = self._known.get(task.shard), self._request.store
        sha256, borrowed = self._sha256(task.shard), self._borrowed(task)
        if sha256 and borrowed is not None:
            key = task.key(sha256, list(borrowed))
            size = store.entry_size(key)
            same = record if record and record.key == key else None
            if size is not None and (same is None or same.size == size):
                why = UNCHANGED if same else IN_CACHE
                dropped = record is not None and record.dropped
                return ShardState(task.shard, FRESH, why, key, task.size, size, dropped)
        if record is None:
            return ShardState(task.shard, STALE, "never converted", None, task.size, 0, False)
        return _state(store, record, *self._why(task, record, sha256, borrowed))

    def _why(
        self,
        task: Task,
        record: EntryRecord,
        sha256: str | None,
        borrowed: tuple[str, ...] | None,
    ) -> tuple[str, str]:
        if sha256 is None and task.size == record.source_size:
            if self._request.store.entry_size(record.key) != record.size:
                return STALE, ENTRY_GONE
            return UNKNOWN, self._why_unknown(task.shard)
        if sha256 == record.source_sha256 and borrowed is None:
            return UNKNOWN, "perhaps borrowed part changed"
        now = record.borrowed_sha256 if borrowed is None else borrowed
        return STALE, why_converted(record, sha256, now, task.sha256, forced=False)

    def _why_unknown(self, shard: str) -> str:
        """Tell why a shard's hash is not remembered, as far as its times show that."""
        manifest = self._request.store.manifest_path(self._request.manifest_name)
        with contextlib.suppress(OSError):
            stamp = FileStamp.of(os.stat(self._request.source.directory / shard))
            if max(stamp.mtime_ns, stamp.ctime_ns) < os.stat(manifest).st_ctime_ns:
                return NOT_REMEMBERED
        return "not read since it was written or moved"

    def _sha256(self, shard: str) -> str | None:
        """Return the shard's SHA-256 if it is known; of a dropped one as it was."""
        if shard not in self._digests:
            self._digests[shard] = self._look_up(shard)
        return self._digests[shard]

    def _look_up(self, name: str) -> str | None:
        shard = Shard(name, self._request.source.directory / name)
        record = self._known.get(name)
        if not os.path.exists(shard.path):
            return record.source_sha256 if record and record.dropped else None
        try:
            return shard.known_sha256(self._request.store.digest_cache)
        except ParoquantStreamError:  # removed meanwhile, or not readable
            return None

    def _borrowed(self, task: Task) -> tuple[str, ...] | None:
        """Return the SHA-256 of what the task borrows, if its lenders are unchanged."""
        record = self._known.get(task.shard)
        if not task.borrowed:
            return ()
        if record is None or len(record.borrowed_sha256) != len(task.borrowed):
            return None
        for lender in task.borrowed:
            before = self._known.get(lender)
            if before is None or self._sha256(lender) != before.source_sha256:
                return None
        return record.borrowed_sha256
