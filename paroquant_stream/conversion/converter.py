"""One conversion from a model directory to a published manifest; a rerun is the same flow.

    directory -> Checkpoint -> Layout -> Plan   headers only; defects are reported before any work
              -> jobs -> EntryRecords           a shard whose key is in the store is not converted
              -> Manifest, published last       so it never names an entry that does not exist

When nothing changed none of this runs: manifest, digest cache and a sample of each file show it.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..checkpoint.model_files import why_no_tokenizer
from ..errors import CheckpointError, StoreError
from ..files.folder import Folder
from ..log import Logger
from ..store.lock import directory_lock
from ..store.manifest import Manifest
from ..trace import NO_TRACE, Trace
from .report import Conversion, report_inside, report_reused
from .request import Request, read_manifest
from .staleness import Needed, staleness

if TYPE_CHECKING:
    from ..backends.backend import Backend
    from .pipeline import EntryReader
    from .planning import ModelPlan
    from .progress import Progress

logger = Logger(__name__)
Loads = Literal["all", "text"]
"""A whole model, or the text part of a vision model."""


def convert(
    request: Request,
    progress: Progress | None = None,
    trace: Trace = NO_TRACE,
    needed: Needed | None = None,
    loads: Loads | None = None,
    reader: EntryReader | None = None,
) -> Conversion:
    """Bring the store up to date with the model and publish the manifest.

    Args:
        request: Model, target and options.
        progress: Called with a shard's name, its finished bytes and its size.
        trace: Gets the time of each stage.
        needed: Where these entries are up to date nothing is done; else everything is converted.
        loads: What the caller loads of the model next, so that a library that this needs and that
            is not installed is an error before any work, and no warning.
        reader: Reads the entries meanwhile, for a caller that loads the model next.

    Raises:
        MissingExtraError: An optional package is needed and not installed; nothing was written.
        CheckpointError: The model cannot be used; before anything is written. Later only for a
            shard that changed or cannot be downloaded.
        StoreError: The cache cannot be written; what was published before stays.
    """
    started = time.monotonic()
    request.store.check_owner()
    current = _current(request, needed)
    if current is None:
        drop = request.options.drop_source
        opened = partial(Folder.open, request.source.directory)
        with directory_lock(opened, exclusive=drop, required=drop) as model_dir:
            how = (progress, trace, needed, loads, reader)
            return _convert_alone(request, model_dir, *how, started)
    request.store.sweep()
    return _unchanged(request, current, started)


def convert_or_find(
    request: Request, progress: Progress | None = None, trace: Trace = NO_TRACE
) -> Conversion:
    """Convert a model, or find what its absent shards were converted to inside its directory.

    Args:
        request: As for `convert`.
        progress: As for `convert`.
        trace: As for `convert`.

    Raises:
        CheckpointError: As `convert` raises.
        StoreError: As `convert` raises.
    """
    started = time.monotonic()
    try:
        return convert(request, progress, trace)
    except CheckpointError as error:
        from .in_place import instead  # few models hold a conversion in place of their shards

        manifest, path = instead(request, error)
    reports = tuple(report_inside(record) for record in manifest.entries)
    return Conversion(manifest, path, reports, time.monotonic() - started)


def _convert_alone(
    request: Request,
    model_dir: Folder | None,
    progress: Progress | None,
    trace: Trace,
    needed: Needed | None,
    loads: Loads | None,
    reader: EntryReader | None,
    started: float,
) -> Conversion:
    """Convert while no other run removes sources of this model."""
    from .pipeline import convert_shards  # half of the start of a run without work
    from .planning import plan_model
    from .source_file import put_all_back

    with suppress(StoreError) if not request.options.drop_source else nullcontext():
        put_all_back(request.source.directory, request.source.config.shard_names)
    with trace.span("plan"):
        model = plan_model(request)
    _log_plan(request, model)
    backend = _backend(model, force_text=loads == "text")
    meanwhile = partial(_import, backend, request, trace) if loads else None
    if loads or request.options.drop_source:
        backend.check_installed()
    if request.options.drop_source:
        from ..model.assemble import check_assembly  # brings mlx-lm, for runs that remove sources

        with trace.span("check that it can be loaded"):
            check_assembly(request.source.config, model.plan)
    elif reason := backend.why_unknown(model.checkpoint.config.values):
        logger.warning("%s: %s", request.source.name, reason)
    if reason := why_no_tokenizer(request.source.directory):
        logger.warning("%s", reason)
    try:
        request.store.create()
    except StoreError:
        if len(model.dropped) < len(model.plan.tasks):
            raise
    request.store.sweep()
    with request.store.lock(request.manifest_name):
        if request.options.drop_source and not request.store.locks_work():
            raise StoreError(
                f"{request.store.root}: locks do nothing on this file system, so `cache rm` would "
                "not see that sources are being removed; convert without --drop-source"
            )
        current = _current(request, needed)  # another process may have just done it
        if current is None:
            how = (progress, trace, started, reader, meanwhile)
            return convert_shards(request, model, model_dir, *how)
    return _unchanged(request, current, started)


def _log_plan(request: Request, model: ModelPlan) -> None:
    tasks, layout = len(model.plan.tasks), model.plan.layout.value
    logger.info("%s: planned, %d shards, layout %s", request.source.name, tasks, layout)


def _import(backend: Backend, request: Request, trace: Trace) -> None:
    with trace.span("import"):
        backend.import_class(request.source.config.values)


def _backend(model: ModelPlan, force_text: bool) -> Backend:
    from ..backends.selection import select_backend

    names = [tensor.name for task in model.plan.tasks for tensor in task.outputs]
    return select_backend(model.checkpoint.config.values, names, force_text)


def _unchanged(request: Request, current: Manifest, started: float) -> Conversion:
    request.store.touch_manifest(request.manifest_name)
    reports = tuple(report_reused(record, record) for record in current.entries)
    path = request.store.manifest_path(request.manifest_name)
    return Conversion(current, path, reports, time.monotonic() - started)


def _current(request: Request, needed: Needed | None) -> Manifest | None:
    """Return the manifest that still holds, or None when there is work."""
    manifest = None if request.options.force else read_manifest(request)
    # for a part all is hashed that is there: a plan of the whole model may be out of reach
    read_unknown = needed is not None
    if manifest is None or staleness(request, manifest, read_unknown, needed) is not None:
        return None
    if any(record.dropped for record in manifest.entries):
        from ..store.drop_record import repair_records  # most models keep their sources
        from .find_dropped import agrees

        if not agrees(request, manifest):
            return None
        with suppress(StoreError):  # a cache that cannot be written serves all the same
            repair_records(request.store)
    paths = [request.source.directory / record.shard for record in manifest.entries]
    return None if request.options.drop_source and any(map(os.path.lexists, paths)) else manifest
