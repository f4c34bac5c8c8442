"""Convert one shard and publish its entry: the function that every worker runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import StoreError
from ..execution.slots import Slot
from ..files.descriptor import FileStamp, closing
from ..files.new_file import NewFile
from ..files.tensor_header import TensorInfo
from ..files.tensor_writer import TensorWriter, end_of, file_size, lay_out
from ..plan.task import Operation, Task
from ..store.damage import confirmed_defect
from ..store.manifest import EntryRecord
from ..store.store import Store
from .operations import run_operation
from .source import Source, Tick

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A task with its model directory and store; small when pickled."""

    task: Task
    directory: Path
    store: Store
    force: bool = False
    """Convert even if the entry exists, and replace it."""
    known: EntryRecord | None = None
    """The record of this shard in an earlier manifest, if there is one."""


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    record: EntryRecord
    """The record of the shard's entry."""
    converted: bool
    """False if the store had the entry already."""
    seconds: float
    """Duration of the job."""


def run_task(job: Job, slot: Slot, tick: Tick) -> Outcome:
    """Find the entry of one shard in the store, or convert the shard and publish a new entry.

    Args:
        job: What is converted.
        slot: The slot that the job runs in.
        tick: Progress callback; what it raises cancels the job.

    Raises:
        CheckpointError: The shard cannot be read.
        MalformedFileError: It is not valid safetensors.
        SourceChangedError: Its bytes changed meanwhile; nothing is stored.
        SourceDamagedError: Its bytes are not those that the Hub names; nothing is stored.
        OutOfRangeError: A value would overflow in the dtype of its output; nothing is stored.
        StoreError: The entry cannot be written.
    """
    started = time.monotonic()
    source = open_source(job, slot, tick)
    try:
        record = None if job.force else find_entry(job, source)
        converted = record is None
        record = record or _convert(job, source, slot)
        return Outcome(record, converted, time.monotonic() - started)
    finally:
        source.close()


def open_source(job: Job, slot: Slot, tick: Tick) -> Source:
    """Open the shard of a job.

    Args:
        job: Whose shard.
        slot: The slot that the job runs in.
        tick: Progress callback.

    Raises:
        CheckpointError: The shard cannot be read.
        MalformedFileError: It is not valid safetensors.
    """
    return Source(job.task, job.directory, job.store.digest_cache, tick, slot)


def find_entry(job: Job, source: Source) -> EntryRecord | None:
    """Find the entry that the store already has for this shard.

    The shard's SHA-256 comes from the digest cache; else the shard is hashed if one of its size was
    hashed before, since that may save the conversion.

    Args:
        job: Whose shard.
        source: The shard, opened.

    Returns:
        The record of the entry, or None if the shard must be converted.
    """
    sha256 = source.known_sha256()
    same_size = job.known is not None and job.known.source_size == job.task.size
    if sha256 is None and (same_size or source.may_be_known()):
        logger.info("%s: hashing, as it may be converted already", job.directory / job.task.shard)
        sha256 = source.hash().sha256
    if sha256 is None:
        return None
    key = job.task.key(sha256, borrowed := source.borrowed_sha256())
    size = job.store.entry_size(key)
    if size is None:
        return None
    if job.known and (job.known.key, job.known.size) == (key, size):
        return replace(job.known, shard=job.task.shard)
    return _adopt(job, sha256, borrowed, key)


def _adopt(job: Job, sha256: str, borrowed: list[str], key: str) -> EntryRecord | None:
    """Return a new record for an entry without one, if its bytes have the digest of its writer."""
    digest = job.store.entry_digest(key)
    if digest is None:
        return None
    size = file_size(job.task.outputs)
    record = _record(job.task, sha256, borrowed, key, digest, size)
    if confirmed_defect(record, job.store):
        return None  # the shard is converted again, and the new entry replaces it
    with suppress(StoreError):  # its writer may have been killed before it did so
        job.store.sync_entry(key)
    return record


def _convert(job: Job, source: Source, slot: Slot) -> EntryRecord:
    header, tensors = lay_out(job.task.outputs)
    size = end_of(header, tensors)
    with job.store.new_file(size, slot.trace) as file:
        _write(job.task, source, slot, file, header, tensors)
        borrowed = source.borrowed_sha256()
        sha256 = source.check()
        key = job.task.key(sha256, borrowed)
        with slot.trace.span("publish", job.task.shard):
            stamp = job.store.publish_entry(file, key)
        _remember(job.store, key, stamp, file.digest)
        return _record(job.task, sha256, borrowed, key, file.digest, size)


def _remember(store: Store, key: str, stamp: FileStamp, digest: str) -> None:
    """Store the digest of a new entry in the digest cache, so that the first load need not hash."""
    with suppress(StoreError), closing(store.open_entry(key)) as fd:
        store.digest_cache.remember_written(fd, stamp, digest)


def _write(
    task: Task,
    source: Source,
    slot: Slot,
    file: NewFile,
    header: bytes,
    tensors: tuple[TensorInfo, ...],
) -> None:
    """Convert the task's outputs in the order of the file; hash in helper threads if possible."""
    operation_of = {
        output.name: operation for operation in task.operations for output in operation.outputs
    }
    held: dict[str, list[bytes]] = {}
    writer = TensorWriter(file.write, header)
    with slot.helper() as pool, source.hashed_by(pool) if pool else nullcontext():
        for tensor in tensors:
            for chunk in _chunks(tensor, operation_of[tensor.name], source, slot, held):
                writer.write(tensor, chunk)
    writer.finish(end_of(header, tensors))


def _chunks(
    tensor: TensorInfo,
    operation: Operation,
    source: Source,
    slot: Slot,
    held: dict[str, list[bytes]],
) -> Iterator[memoryview]:
    """Compute a tensor; hold the other outputs of its operation until they are written.

    Held are the scales and biases of a quantized embedding, 1/8 of its bytes in 16 bit.
    """
    if tensor.name in held:
        yield from (memoryview(chunk) for chunk in held.pop(tensor.name))
        return
    chunks = run_operation(operation, source)
    while True:
        with slot.trace.span(operation.kind, tensor.name):
            result = next(chunks, None)
        if result is None:
            return
        index, view = result
        name = operation.outputs[index].name
        if name == tensor.name:
            yield view
        else:
            held.setdefault(name, []).append(bytes(view))


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
