"""What is asked for: which model, into which store; and whether its manifest still holds."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Shard, config_digest
from .digest import FileStamp, Memo
from .errors import ManifestError
from .manifest import MAX_BYTES, Manifest
from .store import Store
from .task import CAST_VERSION, TRANSFORM, Dtype

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from .arrival import Remote
    from .worker import Places


@dataclass(frozen=True)
class Request:
    """Which model, into which store."""

    model: str
    """As the user named it."""
    directory: Path
    store: Store
    in_place: bool = False
    force: bool = False
    jobs: int = 1
    remote: Remote | None = None
    """Where shards come from that the directory lacks."""
    drop_source: bool = False
    """Remove each shard once its entry is durable and nothing else needs it."""
    dtype: Dtype = "source"
    """How wide floating tensors are stored."""
    executor: Executor | None = None
    """Where shards are converted; None for threads of this process."""
    places: Places | None = None
    """Shared with the conversions of other models; None for `jobs` of its own."""

    @property
    def manifest_name(self) -> str:
        """The manifest's name in the store: by path in a cache, without any beside the model."""
        if self.in_place:
            return f"model-{hashlib.sha256(_options(self.dtype)).hexdigest()[:16]}"
        return model_id(self.directory.resolve(), self.dtype)


def model_id(directory: Path, dtype: Dtype = "source") -> str:
    """The name of the manifest, in a cache, of the model in this resolved directory."""
    return hashlib.sha256(os.fsencode(directory) + b"\0" + _options(dtype)).hexdigest()


def _options(dtype: Dtype) -> bytes:
    """What the user chose that changes an entry."""
    cast = {} if dtype == "source" else {"cast": CAST_VERSION}
    return json.dumps({"dtype": dtype, **cast}, sort_keys=True).encode()


def read_manifest(request: Request) -> Manifest | None:
    """The manifest of an earlier conversion, or None; whatever is wrong with it, it is None."""
    return read_named(request.store, request.manifest_name)


def read_named(store: Store, name: str) -> Manifest | None:
    """The manifest of this name in a store, or None."""
    data = store.read_manifest(name, MAX_BYTES)
    try:
        return Manifest.decode(data) if data is not None else None
    except ManifestError:
        return None


def staleness(request: Request, manifest: Manifest, read_unknown: bool = False) -> str | None:
    """Why the manifest does not hold for the model as it is now, or None when it surely does.

    A shard whose digest is in no memo and no blob name counts as changed, unless `read_unknown`:
    then it is hashed.
    """
    if manifest.transform != TRANSFORM:
        return "made by another version"
    if manifest.config_sha256 != config_digest(request.directory):
        return "config.json or the index changed"
    for record in manifest.entries:
        shard = Shard(record.shard, request.directory / record.shard)
        if not (record.dropped and not os.path.exists(shard.path)):
            reason = source_staleness(request.store.memo, shard, record.source_sha256, read_unknown)
            if reason:
                return reason
        if request.store.entry_size(record.key) != record.size:
            return f"the entry of {record.shard} is absent or cut short"
    return None


def source_staleness(
    memo: Memo, shard: Shard, expected: str, read_unknown: bool = False
) -> str | None:
    """Why a shard's SHA-256 is not the `expected` one, or None when it surely is."""
    try:
        stamp = FileStamp.of(os.stat(shard.path))
    except FileNotFoundError:
        return f"{shard.name} is absent"
    except OSError as error:
        return f"{shard.name} cannot be looked at: {error.strerror}"
    sha256 = memo.lookup(stamp) or shard.hub_sha256
    if sha256 is None and read_unknown:
        sha256 = shard.sha256(memo)
    if sha256 != expected:
        return f"{shard.name} changed, or was never read where it is now"
    return None
