"""Conversions inside a model directory, as a published model ships one."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from ..errors import NewerManifestError, StoreError
from ..store.location import IN_PLACE
from ..store.manifest import Manifest
from ..store.store import Store
from ..trace import NO_TRACE, Trace
from .converter import convert
from .find_dropped import find_manifest, is_superseded
from .progress import Progress
from .request import Request, Target
from .staleness import Needed, staleness

logger = logging.getLogger(__name__)


def converted(
    request: Request, progress: Progress | None = None, trace: Trace = NO_TRACE
) -> tuple[Manifest, Store]:
    """Return the model's conversion and its store, made complete first.

    That is the one inside the model directory if it fits the sources, else the cache's.
    """
    with trace.span("check the sources"):
        found = shipped(request)
    return found or (convert(request, progress, trace).manifest, request.store)


def inside_model(request: Request) -> Request:
    """Give the same request for the conversion inside the model directory, only to be read."""
    store = Store(request.source.directory / IN_PLACE, private=False, read_only=True)
    return replace(request, target=Target(store, in_place=True, variant=request.target.variant))


def shipped(request: Request, needed: Needed | None = None) -> tuple[Manifest, Store] | None:
    """Return the conversion inside the model directory, if it exists and fits the sources.

    Another user may have made it: it is only read, and files whose hashes are not remembered are
    hashed at every load.

    Args:
        request: The model.
        needed: Only these entries must be present.
    """
    if not os.path.lexists(request.source.directory / IN_PLACE):
        return None
    beside = inside_model(request)
    store = beside.store
    manifest = None
    try:
        manifest = find_manifest(beside)
        if manifest is None:
            return None
        reason = staleness(beside, manifest, read_unknown=True, needed=needed)
        if reason is None and is_superseded(request, beside, manifest):
            reason = "made from other shards than those that --drop-source removed later"
    except (StoreError, NewerManifestError) as error:
        reason = str(error)
    if reason or manifest is None:
        logger.warning("%s is not used: %s", store.root, reason)
        return None
    return manifest, store
