"""run_task: the one function that runs in workers. One shard in, one published entry out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import StoreError
from ..execution.slots import Worker
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


@dataclass(frozen=True)
class Job:
    """A task and what a worker needs beside it; pickles small."""

    task: Task
    directory: Path
    store: Store
    force: bool = False
    """Convert even when the entry is there, and put the new one in its place."""
    known: EntryRecord | None = None
    """The record of this shard in an earlier manifest."""


@dataclass(frozen=True)
class Outcome:
    """What a worker did for one shard."""

    record: EntryRecord
    converted: bool
    seconds: float


def run_task(job: Job, worker: Worker, tick: Tick) -> Outcome:
    """Gives the entry of one shard: the one in the store if its key is there, else a new one.

    Raises CheckpointError or MalformedFileError for a shard that cannot be read, SourceChangedError when its
    bytes changed meanwhile (nothing is stored then), StoreError when the entry cannot be written.
    """
    started = time.monotonic()
    source = open_source(job, worker, tick)
    try:
        record = None if job.force else find_entry(job, source)
        converted = record is None
        record = record or _convert(job, source, worker)
        return Outcome(record, converted, time.monotonic() - started)
    finally:
        source.close()


def open_source(job: Job, worker: Worker, tick: Tick) -> Source:
    """The job's shard, opened."""
    return Source(job.task, job.directory, job.store.digest_cache, tick, worker)


def find_entry(job: Job, source: Source) -> EntryRecord | None:
    """The record of the entry that the store already has for this shard, or None.

    The shard's SHA-256 comes from the memo; else the shard is hashed if the store has seen one of
    its size, since that may save the conversion.
    """
    sha256 = source.known_sha256()
    seen = job.known is not None and job.known.source_size == job.task.size
    if sha256 is None and (seen or source.may_be_known()):
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
    """The record of an entry whose record was lost, if it is what its writer hashed.

    One without that digest is made again: its bytes may be damaged since they were written.
    """
    digest = job.store.entry_digest(key)
    if digest is None:
        return None
    size = file_size(job.task.outputs)
    record = _record(job.task, sha256, borrowed, key, digest, size)
    if confirmed_defect(record, job.store):
        return None  # what is made in its place has its name
    job.store.sync_entry(key)
    return record


def _convert(job: Job, source: Source, worker: Worker) -> EntryRecord:
    header, tensors = lay_out(job.task.outputs)
    size = end_of(header, tensors)
    with job.store.new_file(size, worker.trace) as file:
        _write(job.task, source, worker, file, header, tensors)
        borrowed = source.borrowed_sha256()
        sha256 = source.check()
        key = job.task.key(sha256, borrowed)
        with worker.trace.span("publish", job.task.shard):
            stamp = job.store.publish_entry(file, key)
        _remember(job.store, key, stamp, file.digest)
        return _record(job.task, sha256, borrowed, key, file.digest, size)


def _remember(store: Store, key: str, stamp: FileStamp, digest: str) -> None:
    """Spares the first load the hash of an entry that was just published with this stamp."""
    with suppress(StoreError), closing(store.open_entry(key)) as fd:
        store.digest_cache.remember_written(fd, stamp, digest)


def _write(
    task: Task,
    source: Source,
    worker: Worker,
    file: NewFile,
    header: bytes,
    tensors: tuple[TensorInfo, ...],
) -> None:
    """Converts the task's outputs in the order of the file; with a helper, the shard is hashed
    beside the conversion.
    """
    makers = {
        output.name: operation for operation in task.operations for output in operation.outputs
    }
    held: dict[str, list[bytes]] = {}
    writer = TensorWriter(file.write, header)
    with worker.helper() as pool, source.hashing_beside(pool) if pool else nullcontext():
        for tensor in tensors:
            for chunk in _chunks(tensor, makers[tensor.name], source, worker, held):
                writer.write(tensor, chunk)
    writer.finish(end_of(header, tensors))


def _chunks(
    tensor: TensorInfo,
    operation: Operation,
    source: Source,
    worker: Worker,
    held: dict[str, list[bytes]],
) -> Iterator[memoryview]:
    """A tensor's bytes; what else its operation makes is held until its turn.

    Held are the scales and biases of a quantized embedding, 1/8 of its bytes in 16 bit.
    """
    if tensor.name in held:
        yield from (memoryview(chunk) for chunk in held.pop(tensor.name))
        return
    chunks = run_operation(operation, source)
    while True:
        with worker.trace.span(operation.kind, tensor.name):
            made = next(chunks, None)
        if made is None:
            return
        index, view = made
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
