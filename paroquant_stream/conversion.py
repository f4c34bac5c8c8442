"""One conversion from a model directory to a published manifest; a rerun is the same flow.

    directory -> Checkpoint -> Layout -> Plan   headers only; defects are reported before any work
              -> jobs -> EntryRecords           a shard whose key is in the store is not converted
              -> Manifest, published last       so it never names an entry that is not there

When nothing changed none of this runs: the manifest, the memo and one stat a file tell so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arrival import Arrivals
from .checkpoint import Checkpoint, open_checkpoint
from .drop import Dropper, dropped_records, gone, journal_name, kept_header, usable
from .errors import StoreError
from .layout import Quantization, detect, read_quantization
from .manifest import EntryRecord, Manifest
from .plan import Plan, make_plan
from .report import ShardReport, report_converted, report_reused, why_converted
from .request import Request, read_manifest, staleness
from .tally import Progress, Tally
from .task import TRANSFORM, Task
from .tensorfile import file_size
from .trace import SILENCE, Trace

if TYPE_CHECKING:
    from .transform import Outcome


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    manifest: Manifest
    manifest_path: Path
    shards: tuple[ShardReport, ...]
    seconds: float


def convert(
    request: Request, progress: Progress | None = None, trace: Trace = SILENCE
) -> Conversion:
    """Brings the store up to date with the model and publishes the manifest.

    Raises CheckpointError, MalformedFile, LayoutError, PlanError or SourceDropped before anything
    is written; SourceChanged, SourceDamaged, StoreError, or CheckpointError for a shard that cannot
    be fetched, leave what was published before.
    """
    started = time.monotonic()
    request.store.check_owner()
    current = _current(request)
    if current is None:
        with trace.span("plan"):
            plan, checkpoint = plan_model(request)
        request.store.create()
        request.store.sweep()
        with request.store.lock(request.manifest_name):
            current = _current(request)  # another process may have just done it
            if current is None:
                return _convert_shards(request, checkpoint, plan, progress, trace, started)
    else:
        request.store.sweep()
    reports = tuple(report_reused(record, record) for record in current.entries)
    path = request.store.manifest_path(request.manifest_name)
    return Conversion(current, path, reports, time.monotonic() - started)


def _current(request: Request) -> Manifest | None:
    """The manifest that still holds, if there is one and nothing is to be done again."""
    manifest = None if request.force else read_manifest(request)
    if manifest is None or staleness(request, manifest) is not None:
        return None
    paths = [request.directory / record.shard for record in manifest.entries]
    return None if request.drop_source and any(map(os.path.lexists, paths)) else manifest


def plan_model(request: Request) -> tuple[Plan, Checkpoint]:
    """The plan and the checkpoint of a model; reads config, index and headers.

    The headers of shards that the directory lacks are those that were kept when they were dropped,
    or come from the Hub.
    """
    remote, dropped = request.remote, dropped_records(request)
    may_lack = (lambda _: True) if remote else dropped.__contains__
    checkpoint = open_checkpoint(request.directory, may_lack)
    given = {name: kept_header(request, record) for name, record in dropped.items()}
    known = {name: header for name, header in given.items() if header}
    names = [s.name for s in checkpoint.shards if s.name not in known]
    if remote and (absent := [n for n in names if not os.path.exists(request.directory / n)]):
        known |= remote.headers(absent)
    elif lost := given.keys() & set(names):
        raise gone(request, dict.fromkeys(sorted(lost), "the header that was kept is damaged"))
    checkpoint = replace(checkpoint, given=known)
    quantization = read_quantization(checkpoint.config)
    headers = checkpoint.headers()
    dtypes = {tensor.name: tensor.dtype for header in headers.values() for tensor in header.tensors}
    layout = detect(checkpoint.config, dtypes)
    return make_plan(headers, layout, quantization, _experts(checkpoint)), checkpoint


def _experts(checkpoint: Checkpoint) -> int | None:
    """Experts of a layer as the config gives them, for text models and inside `text_config`."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if type(config.get(key)) is int:
                return int(config[key])
    return None


def _convert_shards(
    request: Request,
    checkpoint: Checkpoint,
    plan: Plan,
    progress: Progress | None,
    trace: Trace,
    started: float,
) -> Conversion:
    before = read_manifest(request)
    known = {record.shard: record for record in before.entries} if before else {}
    tasks, dropped, absent = _work(request, plan)
    _check_space(request, tasks)

    def manifest_of(records: Sequence[EntryRecord]) -> Manifest:
        return _manifest(request, checkpoint, plan, records)

    dropper = Dropper(request, plan.tasks, dropped, manifest_of) if request.drop_source else None
    tally = Tally(progress, tasks, absent)
    # at least `jobs`: of the tasks that hold a place, one is then always free to go on
    ahead = max(2, request.jobs) if request.drop_source else None
    reports = {n: report_reused(record, record) for n, record in dropped.items()}
    records = dict(dropped)
    with Arrivals(
        request.remote, request.directory, absent, checkpoint.given, tally.add, ahead
    ) as arrivals:
        for outcome in _run(request, tasks, known, arrivals, tally, trace):
            record, old = replace(outcome.record, dropped=False), known.get(outcome.record.shard)
            records[record.shard] = record
            reports[record.shard] = (
                report_converted(record, old, request.force, outcome.seconds)
                if outcome.converted
                else report_reused(record, old, outcome.seconds)
            )
            if dropper:
                dropper.finish_task(record)
            arrivals.finish_task()
            if progress:
                progress(record.shard, record.source_size, record.source_size)
    names = [task.shard for task in plan.tasks]
    records |= dropper.dropped if dropper else {}
    manifest = manifest_of([records[name] for name in names])
    if manifest != before:  # equal, and a cache that cannot be written still serves
        request.store.write_manifest(request.manifest_name, manifest.encode())
    request.store.remove_manifest(journal_name(request))
    path = request.store.manifest_path(request.manifest_name)
    return Conversion(manifest, path, tuple(reports[n] for n in names), time.monotonic() - started)


def _run(
    request: Request,
    tasks: Sequence[Task],
    known: Mapping[str, EntryRecord],
    arrivals: Arrivals,
    tally: Tally,
    trace: Trace,
) -> Iterator[Outcome]:
    """The outcomes of the tasks as they finish, each begun when its shards are there."""
    from .executor import run_all  # with transform it brings numpy, which a run without work spares
    from .transform import Job, run_task
    from .worker import Worker

    jobs = [
        Job(task, request.directory, request.store, request.force, known.get(task.shard))
        for task in tasks
    ]

    def work(job: Job, worker: Worker) -> Outcome:
        def tick(count: int) -> None:
            worker.check()
            tally.add(job.task.shard, count)

        with trace.span("wait for the shard", job.task.shard):
            arrivals.wait_for((job.task.shard, *job.task.borrowed), worker.check)
        with trace.span("shard", job.task.shard):
            return run_task(job, worker, tick)

    return run_all(work, jobs, request.jobs, trace)


def _work(
    request: Request, plan: Plan
) -> tuple[list[Task], dict[str, EntryRecord], list[list[str]]]:
    """The tasks to run, the records of dropped shards that hold, the absent shards of each task.

    Raises SourceDropped when a shard must be read that nothing can bring.
    """
    dropped, reasons = usable(request, plan.tasks, dropped_records(request))
    tasks = [task for task in plan.tasks if task.shard not in dropped]
    absent = [
        [s for s in (task.shard, *task.borrowed) if not os.path.exists(request.directory / s)]
        for task in tasks
    ]
    if request.remote is None and any(absent):
        lending = {
            shard: reasons.get(shard, f"lends parts to {task.shard}")
            for task, shards in zip(tasks, absent, strict=True)
            for shard in shards
        }
        raise gone(request, lending)
    return tasks, dropped, absent


def _check_space(request: Request, tasks: Sequence[Task]) -> None:
    """Raises StoreError when what will surely be converted has no room: shards of unknown size.

    When sources are dropped their room is used again, so only what is made at once counts.
    """
    memo = request.store.memo
    sure = [task for task in tasks if request.force or not memo.knows_size(task.size)]
    sizes = sorted((file_size(task.outputs) for task in sure), reverse=True)
    needed = sum(sizes[: request.jobs] if request.drop_source else sizes)
    free = request.store.free_bytes()
    if needed > free:
        raise StoreError(
            f"{request.store.root}: {needed:,} bytes needed for {len(sure)} shards, {free:,} free; "
            "make room or choose another --cache-dir"
        )


def _manifest(
    request: Request, checkpoint: Checkpoint, plan: Plan, records: Sequence[EntryRecord]
) -> Manifest:
    quantization: Quantization = plan.quantization
    return Manifest(
        request.model,
        checkpoint.config_sha256,
        TRANSFORM,
        plan.layout.value,
        quantization.bits,
        quantization.group_size,
        tuple(records),
    )


def survey(request: Request) -> tuple[ShardReport, ...]:
    """What `convert` would do for each shard and why; reads what it must and writes nothing."""
    before = read_manifest(request)
    known = {record.shard: record for record in before.entries} if before else {}
    plan, _ = plan_model(request)
    tasks, dropped, absent = _work(request, plan)
    reports = {n: report_reused(record, record) for n, record in dropped.items()}
    for task, missing in zip(tasks, absent, strict=True):
        old = known.get(task.shard)
        reports[task.shard] = (
            _report_work(task, "not downloaded yet") if missing else _survey(request, task, old)
        )
    return tuple(reports[task.shard] for task in plan.tasks)


def _survey(request: Request, task: Task, old: EntryRecord | None) -> ShardReport:
    from .transform import Job, find_entry, open_source
    from .worker import Worker

    store = replace(request.store, read_only=True)
    job = Job(task, request.directory, store, request.force, known=old)
    source = open_source(job, Worker(), lambda _: None)
    try:
        if record := None if request.force else find_entry(job, source):
            return report_reused(record, old)
        sha256, borrowed = source.known_sha256(), source.borrowed_sha256()
        return _report_work(task, why_converted(old, sha256, borrowed, task.sha256, request.force))
    finally:
        source.close()


def _report_work(task: Task, why: str) -> ShardReport:
    size = file_size(task.outputs)
    return ShardReport(task.shard, "converted", why, None, None, task.size, size, 0.0)
