"""Converts the tasks of a model as their shards become present, then writes the manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from ..checkpoint.prefetch import Prefetcher
from ..errors import StoreError
from ..execution.automatic import Automatic
from ..execution.cancellation import Cancellation
from ..execution.threads import in_background, run_all
from ..files.folder import Folder
from ..files.tensor_header import TensorInfo
from ..files.tensor_writer import file_size
from ..plan.task import Task
from ..store.entry_file import EntryCopy
from ..store.format import TRANSFORM
from ..store.manifest import EntryRecord, Manifest
from ..text import bytes_text, counted
from ..trace import Trace
from ..transform.task_runner import Job, Outcome, run_task
from ..transform.unit import cost_of
from ..transform.unit_pool import unit_pool
from .drop_source import Dropper
from .planning import ModelPlan, Work, work_of
from .progress import Progress, Tally
from .report import Conversion, ShardReport, report_converted, report_reused
from .request import Request, read_manifest
from .staleness import is_done

logger = logging.getLogger(__name__)
_FEW_JOBS = 2  # threads keep up with processes then, and only what they write can be copied


class EntryReader(Protocol):
    """Reads entries while others are made."""

    copies: bool
    """Whether `begin` ever returns something."""

    def begin(self, tensors: Sequence[TensorInfo]) -> EntryCopy | None:
        """Return where the bytes of an entry go that is about to be made, if anywhere.

        Args:
            tensors: Of the entry, in file order.
        """

    def add(self, record: EntryRecord, copy: EntryCopy | None) -> None:
        """Take note of an entry, new or reused, once its shard is done.

        Args:
            record: The entry.
            copy: What `begin` returned, if it got the bytes.
        """


def convert_shards(
    request: Request,
    model: ModelPlan,
    model_dir: Folder | None,
    progress: Progress | None,
    trace: Trace,
    started: float,
    reader: EntryReader | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Conversion:
    """Convert what is missing, publish the manifest, and report what became of each shard.

    Args:
        request: The model.
        model: Its plan.
        model_dir: The locked model directory, None where no shard is to be removed.
        progress: As for `convert`.
        trace: As for `convert`.
        started: `time.monotonic()` at the start of the conversion.
        reader: As for `convert`.
        meanwhile: What a thread does while worker processes convert.
    """
    before = read_manifest(request)
    known = _known_records(model, before)
    work = work_of(request, model)
    tally = _begin(request, work, progress)
    kept = work.dropped | work.settled
    reports = {n: report_reused(r, r) for n, r in kept.items()}
    prefetcher = _prefetcher(request, model, work, tally)
    manifest_of = partial(_manifest, request, model)
    with Dropper(request, model, model_dir, manifest_of, trace) as dropper, prefetcher:
        for record in work.settled.values():
            dropper.finish_task(record)
        new = [task for task in work.tasks if not is_done(request, task, known)]
        jobs = _jobs(request, work.tasks, new, known, reader)
        for outcome in _run(request, jobs, new, reader, prefetcher, tally, trace, meanwhile):
            record = replace(outcome.record, dropped=False)
            kept[record.shard] = record
            if reader:
                reader.add(record, outcome.copy)
            reports[record.shard] = _report(request, outcome, record, known.get(record.shard))
            dropper.finish_task(record)
            prefetcher.finish_task()
            tally.finish(record.shard)
        kept |= dropper.dropped
    names = [task.shard for task in model.plan.tasks]
    manifest = manifest_of([kept[name] for name in names])
    path = _write_manifest(request, manifest, before)
    dropper.keep(manifest)
    return Conversion(manifest, path, tuple(reports[n] for n in names), time.monotonic() - started)


def _write_manifest(request: Request, manifest: Manifest, before: Manifest | None) -> Path:
    """Publish the manifest and return its path.

    A cache that cannot be written still serves where there is nothing new to say. A dropped model
    is found by its record too.
    """
    try:
        if manifest != before:
            request.store.write_manifest(request.manifest_name, manifest)
    except StoreError as error:
        if not all(record.dropped for record in manifest.entries):
            raise
        logger.warning("%s", error)
    return request.store.manifest_path(request.manifest_name)


def _begin(request: Request, work: Work, progress: Progress | None) -> Tally:
    """Check what the work needs, and announce it."""
    _check_before_work(request, work.tasks)
    size = bytes_text(sum(task.size for task in work.tasks))
    count, jobs = len(work.tasks), request.jobs
    logger.info("%s: converting %d shards, %s, %d at once", request.source.name, count, size, jobs)
    tally = Tally(progress, work.tasks, work.absent)
    tally.announce()
    return tally


def _prefetcher(request: Request, model: ModelPlan, work: Work, tally: Tally) -> Prefetcher:
    # at least as many as jobs run, so that one of them can always continue
    ahead = max(2, request.jobs) if request.options.drop_source else None
    source, known = request.source, model.checkpoint.known_headers
    return Prefetcher(source.remote, source.directory, work.absent, known, tally.add, ahead)


def _report(
    request: Request, outcome: Outcome, record: EntryRecord, old: EntryRecord | None
) -> ShardReport:
    if outcome.converted:
        report = report_converted(record, old, request.options.force, outcome.seconds)
    else:
        report = report_reused(record, old, outcome.seconds)
    fields = (request.source.name, report.shard, report.action, report.why, report.seconds)
    logger.info("%s: %s: %s, %s, %.1f s", *fields)
    return report


def _known_records(model: ModelPlan, before: Manifest | None) -> dict[str, EntryRecord]:
    """Return the records of earlier runs by shard, also of an interrupted drop."""
    dropped = model.drop.manifest.entries if model.drop else ()
    return {record.shard: record for record in (*dropped, *(before.entries if before else ()))}


def _shards_at_once(request: Request, count: int, in_turn: bool) -> int:
    """Return how many shards are begun before the first is finished.

    Args:
        request: With the number of units that run at once.
        count: Of the shards.
        in_turn: Whether the entries are wanted one after another, to be read meanwhile.
    """
    if request.jobs == 1 or request.options.drop_source:
        return request.jobs
    if in_turn and count <= request.jobs:  # they are split, so that three keep the workers busy
        return max(3, -(-request.jobs // 3))  # more workers for one file wait for each other
    return request.jobs + 1  # so that the workers are busy while an entry is published


def _run(
    request: Request,
    jobs: Sequence[Job],
    new: Sequence[Task],
    reader: EntryReader | None,
    prefetcher: Prefetcher,
    tally: Tally,
    trace: Trace,
    meanwhile: Callable[[], None] | None,
) -> Iterator[Outcome]:
    """Yield the outcomes of jobs as they finish, each begun when its shards are present."""
    at_once = _shards_at_once(request, len(jobs), reader is not None)
    is_copied = reader is not None and reader.copies and request.jobs <= _FEW_JOBS
    shared = request.shared
    parent = shared.cancellation if shared else None

    def work(job: Job, cancellation: Cancellation) -> Outcome:
        def tick(count: int) -> None:
            cancellation.check()
            tally.add(job.task.shard, count)

        with trace.span("wait for the shard", job.task.shard):
            prefetcher.wait_for((job.task.shard, *job.task.borrowed), cancellation.check)
        with trace.span("shard", job.task.shard):
            return run_task(job, pool, tick, trace)

    with Automatic() if shared is None else nullcontext(shared.automatic) as automatic:
        executor = request.options.executor
        if not executor and not is_copied:
            executor = automatic.choose(request.jobs, sum(task.size for task in new))
        executor = executor or (shared.threads if shared else None)
        with unit_pool(
            executor, request.jobs, request.source.directory, request.store, trace
        ) as pool:
            if meanwhile and not pool.is_here:  # threads would wait for the interpreter's lock
                in_background(meanwhile, "meanwhile")
            yield from run_all(work, jobs, at_once, parent)


def _jobs(
    request: Request,
    tasks: Sequence[Task],
    new: Sequence[Task],
    known: Mapping[str, EntryRecord],
    reader: EntryReader | None = None,
) -> list[Job]:
    """Return the jobs; shards larger than the share of a worker in what is left are split.

    Args:
        request: The model.
        tasks: One for each job.
        new: Those among them that are not surely converted already.
        known: The records of earlier runs by shard.
        reader: As for `convert`.
    """
    jobs, shards = list[Job](), {task.shard for task in new}
    costs = [sum(map(cost_of, t.operations)) if t.shard in shards else 0 for t in tasks]
    left, begin = sum(costs), reader.begin if reader else None
    for task, cost in zip(tasks, costs, strict=True):
        split = request.jobs > 1 and request.jobs * cost > left
        left -= cost
        options = (request.options.force, known.get(task.shard), split, begin)
        jobs.append(Job(task, request.source.directory, request.store, *options))
    return jobs


def _check_before_work(request: Request, tasks: Sequence[Task]) -> None:
    """Check what the tasks need that will surely be converted: of shards of unknown size."""
    digest_cache = request.store.digest_cache
    sure = [
        task for task in tasks if request.options.force or not digest_cache.knows_size(task.size)
    ]
    check_space(request, [file_size(task.outputs) for task in sure])


def check_space(request: Request, sizes: Sequence[int]) -> None:
    """Check that entries fit into the store; when sources are dropped, those made at once.

    Args:
        request: Where they go.
        sizes: Bytes of each entry.

    Raises:
        StoreError: They do not fit.
    """
    largest = sorted(sizes, reverse=True)
    needed = sum(largest[: request.jobs] if request.options.drop_source else largest)
    free = request.store.free_bytes()
    if needed > free:
        where = "" if request.target.in_place else " or choose another --cache-dir"
        raise StoreError(
            f"{request.store.root}: {bytes_text(needed)} needed for "
            f"{counted(len(sizes), 'shard')}, {bytes_text(free)} free; free some space{where}"
        )


def _manifest(request: Request, model: ModelPlan, records: Sequence[EntryRecord]) -> Manifest:
    plan = model.plan
    return Manifest(
        request.source.name,
        model.checkpoint.config.sha256,
        TRANSFORM,
        plan.layout.value,
        plan.quantization.bits,
        plan.quantization.group_size,
        tuple(records),
        "" if request.target.in_place else str(request.source.resolved),
    )
