"""What there is to do for a model: its plan, which shards need work, and why."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.layout import detect
from ..checkpoint.quantization import read_quantization
from ..checkpoint.shard import Shard
from ..errors import (
    CheckpointError,
    LayoutError,
    MalformedFileError,
    PlanError,
    SourceDroppedError,
)
from ..files.descriptor import closing
from ..files.hashing import sha256_of_range
from ..files.tensor_header import Header
from ..files.tensor_writer import file_size
from ..plan.planner import Plan, make_plan
from ..plan.task import Part, Task
from ..store.damage import damaged_path
from ..store.drop_record import DropRecord
from ..store.format import DTYPES
from ..store.manifest import EntryRecord
from ..text import counted
from .find_dropped import find_dropped
from .report import ShardReport, report_inside, report_reused, why_converted
from .request import Request, read_manifest
from .staleness import source_staleness


@dataclass(frozen=True)
class ModelPlan:
    """The plan of a model, and what it was made from."""

    plan: Plan
    checkpoint: Checkpoint
    drop: DropRecord | None
    """Of the drop by which shards are absent."""

    @property
    def dropped(self) -> dict[str, EntryRecord]:
        """The records of absent shards that were removed, by shard."""
        here = self.checkpoint.directory
        return {
            record.shard: record
            for record in (self.drop.manifest.entries if self.drop else ())
            if record.dropped and not os.path.exists(here / record.shard)
        }


@dataclass(frozen=True)
class Work:
    """What is to be done for each shard."""

    tasks: list[Task]
    """To run."""
    absent: list[list[str]]
    """For each of them the shards that it reads and that are not there."""
    dropped: dict[str, EntryRecord]
    """Of shards that were removed: the records that hold."""
    settled: dict[str, EntryRecord] = field(default_factory=dict)
    """Of shards that are there, whose lender was removed: the records that hold."""


def plan_model(request: Request) -> ModelPlan:
    """Plan a model; reads config, index and headers.

    The headers of absent shards are those that were kept when the shards were dropped, or come from
    the Hub.

    Raises:
        CheckpointError: The model cannot be used; nothing was written.
    """
    remote, drop = request.source.remote, find_dropped(request)
    gone = {r.shard for r in drop.manifest.entries if r.dropped} if drop else set()
    may_lack = (lambda _: True) if remote else gone.__contains__
    checkpoint = open_checkpoint(request.source.config, may_lack)
    absent = [s.name for s in checkpoint.shards if not os.path.exists(s.path)]
    known = _kept_headers(drop, absent) if drop else {}
    if remote and (wanted := [name for name in absent if name not in known]):
        known |= remote.headers(wanted)
    elif lost := set(absent) - known.keys():
        reasons = dict.fromkeys(sorted(lost), "the header that was kept is damaged")
        raise gone_sources(request, reasons)
    checkpoint = replace(checkpoint, known_headers=known)
    config = checkpoint.config
    quantization = read_quantization(config.values, str(config.path))
    headers = checkpoint.headers()
    dtypes = {tensor.name: tensor.dtype for header in headers.values() for tensor in header.tensors}
    variant = request.target.variant
    dtype, io_bits = DTYPES[variant.dtype], variant.io_bits
    try:
        layout = detect(config.values, dtypes)
        experts = _experts(checkpoint)
        plan = make_plan(headers, layout, quantization, experts, dtype, io_bits=io_bits)
    except (LayoutError, PlanError) as error:
        raise type(error)(f"{request.source.name}: {error}") from error
    return ModelPlan(plan, checkpoint, drop)


def _kept_headers(drop: DropRecord, absent: Sequence[str]) -> dict[str, Header]:
    found: dict[str, Header] = {}
    for name in absent:
        try:
            header = drop.header(name)
        except MalformedFileError:  # as the record is sealed, one that this version refuses
            continue
        if header:
            found[name] = header
    return found


def _experts(checkpoint: Checkpoint) -> int | None:
    """Return how many experts a layer has by the config, also inside `text_config`."""
    text = checkpoint.config.values.get("text_config")
    for config in (checkpoint.config.values, text if isinstance(text, dict) else {}):
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if type(config.get(key)) is int:
                return int(config[key])
    return None


def work_of(request: Request, model: ModelPlan) -> Work:
    """Find what is to be done for each shard.

    Raises:
        SourceDroppedError: A shard must be read that is absent and cannot be downloaded.
    """
    dropped, reasons = _usable(request, model.plan.tasks, model.dropped)
    tasks = [task for task in model.plan.tasks if task.shard not in dropped]
    settled = _settled(request, tasks, model.drop)
    tasks = [task for task in tasks if task.shard not in settled]
    absent = [
        [
            s
            for s in (task.shard, *task.borrowed)
            if not os.path.exists(request.source.directory / s)
        ]
        for task in tasks
    ]
    if request.source.remote is None and any(absent):
        lending = {
            shard: reasons.get(shard, f"lends parts to {task.shard}")
            for task, shards in zip(tasks, absent, strict=True)
            for shard in shards
        }
        raise gone_sources(request, lending)
    return Work(tasks, absent, dropped, settled)


def _usable(
    request: Request, tasks: Sequence[Task], dropped: Mapping[str, EntryRecord]
) -> tuple[dict[str, EntryRecord], dict[str, str]]:
    """Return the records of dropped shards that hold for these tasks, and why others do not."""
    usable: dict[str, EntryRecord] = {}
    reasons: dict[str, str] = {}
    for task in tasks:
        if record := dropped.get(task.shard):
            if reason := _why_unusable(request, task, record):
                reasons[task.shard] = reason
            else:
                usable[task.shard] = record
    return usable, reasons


def _why_unusable(request: Request, task: Task, record: EntryRecord) -> str | None:
    """Tell why an entry does not hold for a task, as far as that shows without its source."""
    if request.options.force:
        return "forced"
    if record.task_sha256 != task.sha256:
        return "config, tensors of its linears or transform version changed"
    if request.store.entry_size(record.key) != record.size:
        kept = damaged_path(request.store, record.key)
        return (
            f"its entry is damaged, and kept as {kept}"
            if kept
            else ("its entry is absent or cut short")
        )
    if _borrows_otherwise(request, task, record):
        return "a part that it borrows changed"
    return None


def _settled(
    request: Request, tasks: Sequence[Task], drop: DropRecord | None
) -> dict[str, EntryRecord]:
    """Return the records of present shards whose key needs a lender that was removed since.

    Their own bytes are compared instead.
    """
    finished = {record.shard: record for record in drop.manifest.entries} if drop else {}
    gone = {shard for shard, record in finished.items() if record.dropped}
    settled: dict[str, EntryRecord] = {}
    for task in tasks:
        path, record = request.source.directory / task.shard, finished.get(task.shard)
        lost = [
            s
            for s in task.borrowed
            if s in gone and not os.path.exists(request.source.directory / s)
        ]
        if not lost or record is None or not os.path.exists(path):
            continue
        digest_cache, shard = request.store.digest_cache, Shard(task.shard, path)
        changed = source_staleness(digest_cache, shard, record.source_sha256, read_unknown=True)
        if not (changed or _why_unusable(request, task, record)):
            settled[task.shard] = replace(record, dropped=False)
    return settled


def _borrows_otherwise(request: Request, task: Task, record: EntryRecord) -> bool:
    """Tell whether a present lender has other bytes now than the entry was made from."""
    if len(task.borrowed) != len(record.borrowed_sha256):
        return True
    lenders = zip(task.borrowed.items(), record.borrowed_sha256, strict=True)
    for (shard, parts), before in lenders:
        if os.path.exists(request.source.directory / shard):
            now = hashlib.sha256(b"".join(_part_digest(request, part) for part in parts))
            if now.hexdigest() != before:
                return True
    return False


def _part_digest(request: Request, part: Part) -> bytes:
    path = request.source.directory / part.shard
    with closing(Shard(part.shard, path).open()) as fd:
        return sha256_of_range(fd, (part.start, part.stop), str(path))


def gone_sources(request: Request, shards: Mapping[str, str]) -> SourceDroppedError:
    """Return the error for shards that must be read and were dropped.

    Args:
        request: Names the model.
        shards: Why each must be read, by name.
    """
    listed = "\n  ".join(f"{shard}: {why}" for shard, why in shards.items())
    return SourceDroppedError(
        f"{request.source.directory}: --drop-source removed {counted(len(shards), 'shard')} that "
        f"must be read again; put them back, or undo the change:\n  {listed}"
    )


def survey(request: Request) -> tuple[ShardReport, ...]:
    """Report what `convert` would do for each shard and why; writes nothing."""
    before = read_manifest(request)
    known = {record.shard: record for record in before.entries} if before else {}
    try:
        model = plan_model(request)
    except CheckpointError as error:
        from .in_place import instead  # it stands above the planning of a run

        return tuple(report_inside(record) for record in instead(request, error)[0].entries)
    work = work_of(request, model)
    reports = {n: report_reused(r, r) for n, r in (work.dropped | work.settled).items()}
    for task, missing in zip(work.tasks, work.absent, strict=True):
        old = known.get(task.shard)
        reports[task.shard] = (
            _report_work(task, "not downloaded yet") if missing else _survey(request, task, old)
        )
    return tuple(reports[task.shard] for task in model.plan.tasks)


def _survey(request: Request, task: Task, old: EntryRecord | None) -> ShardReport:
    from ..transform.source_shard import SourceShard
    from ..transform.task_runner import Job, find_entry
    from ..transform.unit_pool import UnitPool

    store = replace(request.store, read_only=True)
    job = Job(task, request.source.directory, store, request.options.force, known=old)
    shard = SourceShard(task, job.directory, store.digest_cache)
    try:
        known = None if request.options.force else find_entry(job, shard, UnitPool(1), _ignore)
        if known:
            return report_reused(known, old)
        sha256, borrowed = shard.known_sha256(), shard.borrowed_sha256()
        return _report_work(
            task, why_converted(old, sha256, borrowed, task.sha256, request.options.force)
        )
    finally:
        shard.close()


def _ignore(_count: int) -> None:
    """Report no progress."""


def _report_work(task: Task, why: str) -> ShardReport:
    size = file_size(task.outputs)
    return ShardReport(task.shard, "converted", why, None, None, task.size, size, 0.0)
