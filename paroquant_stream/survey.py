"""What there is to do for a model, before any of it is done: its plan, which shards need work, and
why.
"""

from __future__ import annotations

import os
from dataclasses import replace

from .checkpoint import Checkpoint, open_checkpoint
from .drop import dropped_records, gone, kept_header, usable
from .layout import detect, read_quantization
from .manifest import EntryRecord
from .plan import Plan, make_plan
from .report import ShardReport, report_reused, why_converted
from .request import Request, read_manifest
from .task import DTYPES, Task
from .tensorfile import file_size


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
    dtype = DTYPES[request.dtype]
    return make_plan(headers, layout, quantization, _experts(checkpoint), dtype), checkpoint


def _experts(checkpoint: Checkpoint) -> int | None:
    """Experts of a layer as the config gives them, for text models and inside `text_config`."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if type(config.get(key)) is int:
                return int(config[key])
    return None


def work_of(
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


def survey(request: Request) -> tuple[ShardReport, ...]:
    """What `convert` would do for each shard and why; reads what it must and writes nothing."""
    before = read_manifest(request)
    known = {record.shard: record for record in before.entries} if before else {}
    plan, _ = plan_model(request)
    tasks, dropped, absent = work_of(request, plan)
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
