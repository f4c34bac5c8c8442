"""Convert one shard and publish its entry: the units run in workers, the rest in the run itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import StoreError
from ..files.descriptor import FileStamp, closing
from ..files.tensor_header import TensorInfo
from ..files.tensor_writer import file_size, lay_out
from ..plan.task import Task
from ..store.damage import confirmed_defect
from ..store.entry_digest import is_tree, tree_digest_of
from ..store.entry_file import EntryCopy, EntryFile
from ..store.manifest import EntryRecord
from ..store.store import Store
from ..trace import NO_TRACE, Trace
from .source import Tick
from .source_shard import SourceShard
from .unit import Step, Unit, ranges_of, steps_of, units_of
from .unit_pool import UnitPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A task with its model directory and store."""

    task: Task
    directory: Path
    store: Store
    force: bool = False
    """Convert even if the entry exists, and replace it."""
    known: EntryRecord | None = None
    """The record of this shard in an earlier manifest, if there is one."""
    split: bool = False
    """Whether several workers convert the shard, since others would be idle."""
    begin_copy: Callable[[Sequence[TensorInfo]], EntryCopy | None] | None = None
    """Called before an entry with these tensors is written by this process alone."""


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    record: EntryRecord
    """The record of the shard's entry."""
    converted: bool
    """False if the store had the entry already."""
    seconds: float
    """Duration of the job."""
    copy: EntryCopy | None = None
    """What got the bytes of the entry, if one was begun."""


def run_task(job: Job, pool: UnitPool, tick: Tick, trace: Trace = NO_TRACE) -> Outcome:
    """Find the entry of one shard in the store, or convert the shard and publish a new entry.

    Args:
        job: What is converted.
        pool: Runs the units.
        tick: Progress callback; what it raises cancels the job.
        trace: Gets the time of each stage.

    Raises:
        CheckpointError: The shard cannot be read.
        MalformedFileError: It is not valid safetensors.
        SourceChangedError: Its bytes changed meanwhile; nothing is stored.
        SourceDamagedError: Its bytes are not those that the Hub names; nothing is stored.
        OutOfRangeError: A value would overflow in the dtype of its output; nothing is stored.
        StoreError: The entry cannot be written.
    """
    started = time.monotonic()
    shard = SourceShard(job.task, job.directory, job.store.digest_cache)
    try:
        record, copy = None if job.force else find_entry(job, shard, pool, tick), None
        converted = record is None
        if record is None:
            record, copy = _convert(job, shard, pool, tick, trace)
        return Outcome(record, converted, time.monotonic() - started, copy)
    finally:
        shard.close()


def find_entry(job: Job, shard: SourceShard, pool: UnitPool, tick: Tick) -> EntryRecord | None:
    """Find the entry that the store already has for this shard.

    The shard's SHA-256 comes from the digest cache; else the shard is hashed if one of its size and
    sample was hashed before, since that may save the conversion.

    Args:
        job: Whose shard.
        shard: The shard, opened.
        pool: Runs the unit that hashes it.
        tick: Progress callback.

    Returns:
        The record of the entry, or None if the shard must be converted.
    """
    sha256 = shard.known_sha256()
    if sha256 is None and shard.may_be_known(job.known):
        logger.info("%s: hashing, as it may be converted already", job.directory / job.task.shard)
        steps = steps_of(job.task, lay_out(job.task.outputs)[1])
        shard.add(pool.hash(replace(_all(job, shard, steps, None), steps=()), tick))
        sha256 = shard.known_sha256()
    if sha256 is None:
        return None
    key = job.task.key(sha256, borrowed := shard.borrowed_sha256())
    size = job.store.entry_size(key)
    if size is None:
        return None
    if job.known and (job.known.key, job.known.size) == (key, size):
        return replace(job.known, shard=job.task.shard)
    return _adopt(job, sha256, borrowed, key)


def _adopt(job: Job, sha256: str, borrowed: list[str], key: str) -> EntryRecord | None:
    """Return a new record for an entry without one, if its bytes have the digest of its writer."""
    digest, store = job.store.entry_digest(key), job.store
    if digest is None:
        return None
    size = file_size(job.task.outputs)
    record = _record(job.task, sha256, borrowed, key, digest, size)
    if confirmed_defect(record, store):
        return None  # the shard is converted again, and the new entry replaces it
    if not is_tree(digest):
        with closing(store.open_entry(key)) as fd:
            label = str(store.entry_path(key))
            tree = tree_digest_of(fd, lay_out(record.tensors)[1], label, digest)
        if tree is None:
            return None
        record = replace(record, digest=tree)
        store.write_digest(key, record.digest, size)
    with suppress(StoreError):  # its writer may have been killed before it did so
        store.sync_entry(key)
    return record


def _all(job: Job, shard: SourceShard, steps: list[Step], path: Path | None) -> Unit:
    """Return the unit that hashes a shard and converts all of it."""
    hashed = (shard.header, *ranges_of(job.task.shard, steps))
    return Unit(job.task.shard, job.directory, job.store, tuple(steps), path, hashed)


def _convert(
    job: Job, shard: SourceShard, pool: UnitPool, tick: Tick, trace: Trace
) -> tuple[EntryRecord, EntryCopy | None]:
    with job.store.new_entry(job.task.outputs) as file:
        copy = job.begin_copy(file.tensors) if job.begin_copy and pool.is_here else None
        unit = _all(job, shard, steps_of(job.task, file.tensors), file.path)
        unit = replace(unit, copy=copy)
        if shard.is_hashed:
            unit = replace(unit, hashed=None)
        for result in pool.run(units_of(unit, job.split), tick):
            shard.add(result)
            file.add(result.pieces)
        return _publish(job, shard, file, trace), copy


def _publish(job: Job, shard: SourceShard, file: EntryFile, trace: Trace) -> EntryRecord:
    borrowed, sha256, digest = shard.borrowed_sha256(), shard.check(), file.digest
    key = job.task.key(sha256, borrowed)
    with trace.span("publish", job.task.shard):
        stamp = job.store.publish_entry(file, key)
    _remember(job.store, key, stamp, digest)
    return _record(job.task, sha256, borrowed, key, digest, file.size)


def _remember(store: Store, key: str, stamp: FileStamp, digest: str) -> None:
    """Store the digest of a new entry in the digest cache, so that the first load need not hash."""
    with suppress(StoreError), closing(store.open_entry(key)) as fd:
        store.digest_cache.remember_written(fd, stamp, digest)


def _record(
    task: Task, sha256: str, borrowed: list[str], key: str, digest: str, size: int
) -> EntryRecord:
    return EntryRecord(
        shard=task.shard,
        source_sha256=sha256,
        source_size=task.size,
        borrowed_sha256=tuple(borrowed),
        task_sha256=task.sha256,
        key=key,
        digest=digest,
        size=size,
        tensors=tuple(task.outputs),
    )
