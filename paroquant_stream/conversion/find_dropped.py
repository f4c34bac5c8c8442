"""Which drop removed a model's absent shards, found by what is left of the model.

The note in its directory comes first, then its path, then its revision on the Hub, then its config
and index. A record holds only if no present shard contradicts it: else a model that was half copied
over another one would be completed with the other's weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.shard import Shard
from ..errors import CheckpointError, SourceDroppedError
from ..store.drop_note import NOTE, read_note
from ..store.drop_record import DropRecord, new_id, read_record, read_records, record_ids
from ..store.manifest import Manifest
from .request import Request, read_manifest
from .staleness import source_staleness


def find_dropped(request: Request) -> DropRecord | None:
    """Find the record of the drop that removed absent shards of this model, if it was one.

    Raises:
        SourceDroppedError: A present shard has other content than the record says.
        CheckpointError: Records of two models fit, or a file cannot be read.
    """
    absent = {n for n in request.source.config.shard_names if not _is_there(request, n)}
    if not absent:
        return None
    records = [r for r in read_records(request.store) if r.variant == request.target.variant]
    records = [r for r in records if absent & _dropped_shards(r)]
    contradicted: str | None = None
    for group in _by_evidence(request, records):
        fitting = []
        for record in group:
            reason = _contradiction(request, record)
            contradicted = contradicted or reason
            fitting += [] if reason else [record]
        if fitting:
            return _only(request, fitting)
    if contradicted and request.source.remote is None:
        raise SourceDroppedError(contradicted)
    if read_note(request.source.directory) is None:
        return _from_manifest(request, absent)
    if request.source.remote is None:
        raise SourceDroppedError(_not_here(request))
    return None


def _not_here(request: Request) -> str:
    noted = read_note(request.source.directory)
    known = read_record(request.store, noted) if noted else None
    advice = "name the cache, dtype and io-bits that it was converted with"
    if known and known.variant != request.target.variant:
        advice = f"pass {known.variant.how_asked}, with which it was converted"
    options = request.target.variant.options or " --dtype source"
    return (
        f"{request.source.directory}: its shards were removed by --drop-source, and "
        f"{request.store.root} has no record of that for{options}; {advice}, or put the shards back"
    )


def find_manifest(request: Request) -> Manifest | None:
    """Return a model's manifest, or the one in its drop record where the manifest was lost.

    Raises:
        NewerManifestError: A record is of a newer format.
    """
    if manifest := read_manifest(request):
        return manifest
    names = set(request.source.config.shard_names)
    records = [
        record
        for record in read_records(request.store)
        if record.variant == request.target.variant
        and record.manifest.config_sha256 == request.source.config.sha256
        and names == {entry.shard for entry in record.manifest.entries}
    ]
    noted = read_note(request.source.directory)
    complete = [r.manifest for r in records if r.id == noted] or [r.manifest for r in records]
    sources = {frozenset((e.shard, e.source_sha256) for e in m.entries) for m in complete}
    return complete[0] if len(sources) == 1 else None


def is_superseded(request: Request, beside: Request, manifest: Manifest) -> bool:
    """Tell whether a later drop removed other shards than an in-place conversion was made from.

    Args:
        request: A request for the model in the cache.
        beside: A request for the conversion inside its directory.
        manifest: The manifest of that one.
    """
    absent = {e.shard: e.source_sha256 for e in manifest.entries if not _is_there(request, e.shard)}
    noted = read_note(request.source.directory) if absent else None
    if noted is None:
        return False
    record = read_record(beside.store, noted) or read_record(request.store, noted)
    known = {e.shard: e.source_sha256 for e in record.manifest.entries} if record else {}
    return any(known.get(shard) != sha256 for shard, sha256 in absent.items())


def agrees(request: Request, manifest: Manifest) -> bool:
    """Tell whether a manifest found by its path is of the model that lies there now.

    A directory without shards may have been moved there since; then it has a note.
    """
    dropped = {(e.shard, e.source_sha256) for e in manifest.entries if e.dropped}
    noted = read_note(request.source.directory) if dropped else None
    if noted is None:
        return True
    record = read_record(request.store, noted)
    if record is None:  # in place: the note is of a drop into the cache
        return request.target.in_place or noted in record_ids(request.store)  # else damaged
    return dropped <= {
        (entry.shard, entry.source_sha256) for entry in record.manifest.entries if entry.dropped
    }


def _by_evidence(request: Request, records: Sequence[DropRecord]) -> Iterator[list[DropRecord]]:
    """Yield the records that something speaks for, the best evidence first."""
    noted = read_note(request.source.directory)
    known = read_record(request.store, noted) if noted else None
    if request.target.in_place and known is None:  # the tree holds no other model's
        yield list(records)
        return
    if noted:
        yield [record for record in records if record.id == noted]
        if known:  # of another variant, and of the same shards
            yield [record for record in records if _is_of_sources(record, known)]
        return  # any other is of another model, or of this one as it was before
    here = str(request.source.resolved)
    config = request.source.config.sha256
    alike = [r for r in records if r.manifest.config_sha256 == config]
    yield [r for r in alike if r.manifest.directory == here]
    revision = _revision(here)
    yield [r for r in alike if revision and _revision(r.manifest.directory) == revision]
    if request.source.remote is not None:  # its shards can be downloaded
        return
    yield [
        r
        for r in alike
        if not (revision and _revision(r.manifest.directory)) and _has_moved(r.manifest.directory)
    ]


def _is_of_sources(record: DropRecord, other: DropRecord) -> bool:
    known = {entry.shard: entry.source_sha256 for entry in other.manifest.entries}
    return all(known.get(e.shard) == e.source_sha256 for e in record.manifest.entries)


def _has_moved(directory: str) -> bool:
    """Tell whether no model lies at a path: else another directory is no moved one."""
    return not os.path.exists(Path(directory) / "config.json")


def _revision(directory: str) -> tuple[str, str] | None:
    """Return repository and commit of a snapshot in a Hub cache, wherever that cache lies."""
    path = Path(directory)
    repository = path.parent.parent.name
    snapshot = path.parent.name == "snapshots" and repository.startswith("models--")
    return (repository, path.name) if snapshot else None


def _only(request: Request, fitting: Sequence[DropRecord]) -> DropRecord:
    """Return the most complete record where all that fit are of one model."""
    best = max(fitting, key=lambda record: len(record.manifest.entries))
    known = {(e.shard, e.source_sha256) for e in best.manifest.entries}
    for record in fitting:
        if not {(e.shard, e.source_sha256) for e in record.manifest.entries} <= known:
            raise CheckpointError(
                f"{request.source.directory}: its shards were removed by --drop-source, and of two "
                f"models with this config and index, {best.manifest.directory} and "
                f"{record.manifest.directory}, both were; move the directory back to where it "
                f"was, or put back the file {NOTE} that was left in it"
            )
    return best


def _contradiction(request: Request, record: DropRecord) -> str | None:
    """Tell which present shard is not the one that the record knows."""
    for entry in record.manifest.entries:
        shard = Shard(entry.shard, request.source.directory / entry.shard)
        if not _is_there(request, entry.shard):
            continue
        if source_staleness(
            request.store.digest_cache, shard, entry.source_sha256, read_unknown=True
        ):
            return (
                f"{shard.path}: expected SHA-256 {entry.source_sha256}, as it had when "
                "--drop-source removed shards of this model, found another; the removed ones "
                "cannot complete it: put back all shards of one model"
            )
    return None


def _from_manifest(request: Request, absent: set[str]) -> DropRecord | None:
    """Make a record, not stored yet, of what an older version dropped."""
    manifest = read_manifest(request)
    if manifest is None or manifest.config_sha256 != request.source.config.sha256:
        return None
    record = DropRecord(new_id(), request.target.variant, manifest)
    if not absent & _dropped_shards(record) or _contradiction(request, record):
        return None
    headers = {}
    for entry in manifest.entries:
        data = request.store.read_file("headers", entry.source_sha256, 33 << 20) or b""
        if entry.dropped and hashlib.sha256(data[32:]).digest() == data[:32]:
            headers[entry.shard] = data[32:]
    return replace(record, headers=headers)


def _dropped_shards(record: DropRecord) -> set[str]:
    return {entry.shard for entry in record.manifest.entries if entry.dropped}


def _is_there(request: Request, shard: str) -> bool:
    return os.path.exists(request.source.directory / shard)
