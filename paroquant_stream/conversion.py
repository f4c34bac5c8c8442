"""One conversion from a model directory to a published manifest; a rerun is the same flow.

    directory -> Checkpoint -> Layout -> Plan   headers only; defects are reported before any work
              -> jobs -> EntryRecords           a shard whose key is in the store is not converted
              -> Manifest, published last       so it never names an entry that is not there

When nothing changed none of this runs: the manifest, the memo and a sample of each file tell so.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from .manifest import Manifest
from .report import Conversion, report_reused
from .request import Needed, Request, read_manifest, staleness
from .trace import SILENCE, Trace

if TYPE_CHECKING:
    from .tally import Progress


def convert(
    request: Request,
    progress: Progress | None = None,
    trace: Trace = SILENCE,
    needed: Needed | None = None,
) -> Conversion:
    """Brings the store up to date with the model and publishes the manifest.

    Where what is `needed` of it is up to date nothing is done; else everything is converted.
    Raises CheckpointError, MalformedFile, LayoutError, PlanError or SourceDropped before anything
    is written; SourceChanged, SourceDamaged, StoreError, or CheckpointError for a shard that cannot
    be fetched, leave what was published before.
    """
    started = time.monotonic()
    request.store.check_owner()
    current = _current(request, needed)
    if current is None:
        from .shards import convert_shards  # half of the start of a run without work
        from .survey import plan_model

        with trace.span("plan"):
            plan, checkpoint = plan_model(request)
        request.store.create()
        request.store.sweep()
        with request.store.lock(request.manifest_name):
            current = _current(request, needed)  # another process may have just done it
            if current is None:
                return convert_shards(request, checkpoint, plan, progress, trace, started)
    else:
        request.store.sweep()
    request.store.touch_manifest(request.manifest_name)
    reports = tuple(report_reused(record, record) for record in current.entries)
    path = request.store.manifest_path(request.manifest_name)
    return Conversion(current, path, reports, time.monotonic() - started)


def _current(request: Request, needed: Needed | None) -> Manifest | None:
    """The manifest that still holds, if there is one and nothing is to be done again."""
    manifest = None if request.force else read_manifest(request)
    # for a part all is hashed that is there: a plan of the whole model may be out of reach
    read_unknown = needed is not None
    if manifest is None or staleness(request, manifest, read_unknown, needed) is not None:
        return None
    paths = [request.directory / record.shard for record in manifest.entries]
    return None if request.drop_source and any(map(os.path.lexists, paths)) else manifest
