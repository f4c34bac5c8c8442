"""One conversion from a model directory to a published manifest; a rerun is the same flow.

    directory -> Checkpoint -> Layout -> Plan   headers only; defects are reported before any work
              -> jobs -> EntryRecords           a shard whose key is in the store is not converted
              -> Manifest, published last       so it never names an entry that is not there

When nothing changed none of this runs: the manifest, the memo and one stat a file tell so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .errors import StoreError
from .layout import Quantization, detect, read_quantization
from .manifest import EntryRecord, Manifest
from .plan import Plan, make_plan
from .report import ShardReport, report_converted, report_reused, why_converted
from .request import Request, read_manifest, staleness
from .task import DTYPES, TRANSFORM, Task
from .tensorfile import file_size

Progress = Callable[[str, int, int], None]
"""Called with a shard's name, the source bytes of it that are done, and its size."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    manifest: Manifest
    manifest_path: Path
    shards: tuple[ShardReport, ...]
    seconds: float


def convert(request: Request, progress: Progress | None = None) -> Conversion:
    """Brings the store up to date with the model and publishes the manifest.

    Raises CheckpointError, MalformedFile, LayoutError or PlanError before anything is written;
    SourceChanged or StoreError leave what was published before.
    """
    started = time.monotonic()
    request.store.check_owner()
    current = _current(request)
    if current is None:
        plan, checkpoint = plan_model(request)
        request.store.create()
        request.store.sweep()
        with request.store.lock(request.manifest_name):
            current = _current(request)  # another process may have just done it
            if current is None:
                return _convert_shards(request, checkpoint, plan, progress, started)
    else:
        request.store.sweep()
    reports = tuple(report_reused(record, record) for record in current.entries)
    path = request.store.manifest_path(request.manifest_name)
    return Conversion(current, path, reports, time.monotonic() - started)


def _current(request: Request) -> Manifest | None:
    """The manifest that still holds, if there is one and nothing is to be done again."""
    manifest = None if request.force else read_manifest(request)
    return manifest if manifest and staleness(request, manifest) is None else None


def plan_model(request: Request) -> tuple[Plan, Checkpoint]:
    """The plan and the checkpoint of a model; reads config, index and headers."""
    checkpoint = open_checkpoint(request.directory)
    quantization = read_quantization(checkpoint.config)
    headers = checkpoint.headers()
    dtypes = {tensor.name: tensor.dtype for header in headers.values() for tensor in header.tensors}
    layout = detect(checkpoint.config, dtypes)
    dtype = DTYPES[request.dtype]
    plan = make_plan(headers, layout, quantization, _experts(checkpoint), dtype)
    return plan, checkpoint


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
    started: float,
) -> Conversion:
    from .executor import run_all  # with transform it brings numpy, which a run without work spares
    from .source import Buffers
    from .transform import Job, Outcome, run_task

    _check_space(request, plan)
    before = read_manifest(request)
    known = {record.shard: record for record in before.entries} if before else {}
    threads = max(1, request.jobs // len(plan.tasks))
    jobs = [
        Job(task, request.directory, request.store, request.force, threads, known.get(task.shard))
        for task in plan.tasks
    ]

    workers = threading.local()

    def work(job: Job, checkpoint: Callable[[], None]) -> Outcome:
        if not hasattr(workers, "buffers"):
            workers.buffers = Buffers()
        return run_task(job, _Ticker(job.task, checkpoint, progress), workers.buffers)

    reports: dict[str, ShardReport] = {}
    records: dict[str, EntryRecord] = {}
    for outcome in run_all(work, jobs, request.jobs):
        record, old = outcome.record, known.get(outcome.record.shard)
        records[record.shard] = record
        reports[record.shard] = (
            report_converted(record, old, request.force, outcome.seconds)
            if outcome.converted
            else report_reused(record, old, outcome.seconds)
        )
        if progress:
            progress(record.shard, record.source_size, record.source_size)
    names = [task.shard for task in plan.tasks]
    manifest = _manifest(request, checkpoint, plan, [records[name] for name in names])
    if manifest != before:  # equal, and a cache that cannot be written still serves
        request.store.write_manifest(request.manifest_name, manifest.encode())
    path = request.store.manifest_path(request.manifest_name)
    return Conversion(manifest, path, tuple(reports[n] for n in names), time.monotonic() - started)


def _check_space(request: Request, plan: Plan) -> None:
    """Raises StoreError when what will surely be converted has no room: shards of unknown size."""
    memo = request.store.memo
    sure = [task for task in plan.tasks if request.force or not memo.knows_size(task.size)]
    needed = sum(file_size(task.outputs) for task in sure)
    free = request.store.free_bytes()
    if needed > free:
        raise StoreError(
            f"{request.store.root}: {needed:,} bytes needed for {len(sure)} shards, {free:,} free; "
            "make room or choose another --cache-dir"
        )


def _manifest(
    request: Request, checkpoint: Checkpoint, plan: Plan, records: list[EntryRecord]
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


class _Ticker:
    """Turns ticks into progress: every source byte is ticked twice, hashed and converted."""

    def __init__(
        self, task: Task, checkpoint: Callable[[], None], progress: Progress | None
    ) -> None:
        self._task, self._checkpoint, self._progress = task, checkpoint, progress
        self._ticked = 0
        self._lock = threading.Lock()  # hash and conversion may tick from two threads

    def __call__(self, count: int) -> None:
        self._checkpoint()
        if self._progress:
            with self._lock:
                self._ticked += count
                self._progress(
                    self._task.shard, min(self._ticked // 2, self._task.size), self._task.size
                )


def survey(request: Request) -> tuple[ShardReport, ...]:
    """What `convert` would do for each shard and why; reads what it must and writes nothing."""
    from .transform import Job, find_entry, open_source

    before = read_manifest(request)
    known = {record.shard: record for record in before.entries} if before else {}
    plan, _ = plan_model(request)
    reports = []
    for task in plan.tasks:
        old = known.get(task.shard)
        job = Job(
            task,
            request.directory,
            replace(request.store, read_only=True),
            request.force,
            known=old,
        )
        source = open_source(job, lambda _: None)
        try:
            if record := None if request.force else find_entry(job, source):
                reports.append(report_reused(record, old))
                continue
            sha256, borrowed = source.known_sha256(), source.borrowed_sha256()
            why = why_converted(old, sha256, borrowed, task.sha256, request.force)
            size = file_size(task.outputs)
            reports.append(
                ShardReport(task.shard, "converted", why, None, None, task.size, size, 0.0)
            )
        finally:
            source.close()
    return tuple(reports)
