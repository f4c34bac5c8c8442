"""Conversions inside a model directory, as a published model ships one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, SourceDroppedError, StoreError
from ..log import Logger
from ..store.format import DTYPES, VARIANTS, Dtype, Variant
from ..store.location import IN_PLACE
from ..store.manifest import Manifest
from ..store.store import Store
from ..trace import NO_TRACE, Trace
from .converter import Loads, convert
from .request import Request, Target, read_manifest
from .staleness import Needed, staleness

if TYPE_CHECKING:
    from .progress import Progress

logger = Logger(__name__)


def converted(
    request: Request,
    progress: Progress | None = None,
    trace: Trace = NO_TRACE,
    loads: Loads | None = None,
) -> tuple[Manifest, Store]:
    """Return the model's conversion and its store, made complete first.

    That is the one inside the model directory if it fits the sources, else the cache's.
    """
    with trace.span("check the sources"):
        found = shipped(request)
    return found or (convert(request, progress, trace, loads=loads).manifest, request.store)


def instead(request: Request, error: CheckpointError) -> tuple[Manifest, Path]:
    """Return the conversion inside the model for one that cannot be made without absent shards.

    Args:
        request: The conversion that cannot be made.
        error: Why.

    Returns:
        Its manifest, and where that lies.

    Raises:
        SourceDroppedError: That conversion does not serve this request; says why.
        CheckpointError: `error`, where no conversion explains it.
    """
    source, beside = request.source, inside_model(request)
    if not _held_alone(request):
        raise error
    if request.options.force or request.options.drop_source:
        raise SourceDroppedError(
            f"{source.name}: its shards are gone, and {beside.store.root} holds what they were "
            "converted to; load uses that, nothing else can be made of it"
        ) from error
    check_variant(request, error)
    if found := shipped(request):
        return found[0], beside.store.manifest_path(beside.manifest_name)
    raise error


def check_variant(request: Request, error: CheckpointError) -> None:
    """Raise SourceDroppedError if only other conversions than this one are inside a model.

    Args:
        request: A conversion that cannot be made.
        error: Why.
    """
    held = _held_alone(request)
    if held and request.target.variant not in held:
        root = inside_model(request).store.root
        raise SourceDroppedError(
            f"{request.source.name}: its shards are gone, and {root} holds what they were "
            f"converted to with {' and with '.join(v.how_asked for v in held)} alone; pass that"
        ) from error


def _held_alone(request: Request) -> list[Variant]:
    """Return the conversions inside a model directory that lacks shards; none if it lacks none."""
    source, beside = request.source, inside_model(request)
    absent = any(not os.path.lexists(source.directory / name) for name in source.config.shard_names)
    if request.target.in_place or source.remote or not absent:
        return []
    return [v for v in VARIANTS.values() if read_manifest(beside.with_variant(v))]


def dtypes_converted(request: Request) -> list[Dtype]:
    """Return the dtypes to which the model is converted, in its directory or in the cache."""
    beside = inside_model(request)
    return [
        d
        for d in DTYPES
        if any(read_manifest(r.with_variant(Variant(d))) for r in (beside, request))
    ]


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
    from .find_dropped import find_manifest, is_superseded  # late: most models keep their sources

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
    except StoreError as error:
        reason = str(error)
    if reason or manifest is None:
        logger.warning("%s is not used: %s", store.root, reason)
        return None
    return manifest, store
