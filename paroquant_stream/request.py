"""What is asked for: which model, into which store; and whether its manifest still holds."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Shard, config_digest
from .digest import FileStamp
from .errors import ManifestError
from .manifest import MAX_BYTES, Manifest
from .store import Store
from .task import CAST_VERSION, TRANSFORM, Dtype


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
    dtype: Dtype = "source"
    """How wide floating tensors are stored."""

    @property
    def options(self) -> dict[str, str | int]:
        """What the user chose that changes an entry."""
        cast = {} if self.dtype == "source" else {"cast": CAST_VERSION}
        return {"dtype": self.dtype, **cast}

    @property
    def manifest_name(self) -> str:
        """The manifest's name in the store: by path in a cache, without any beside the model."""
        options = json.dumps(self.options, sort_keys=True)
        if self.in_place:
            return f"model-{hashlib.sha256(options.encode()).hexdigest()[:16]}"
        path = os.fsencode(self.directory.resolve())
        return hashlib.sha256(path + b"\0" + options.encode()).hexdigest()


def read_manifest(request: Request) -> Manifest | None:
    """The manifest of an earlier conversion, or None; whatever is wrong with it, it is None."""
    data = request.store.read_manifest(request.manifest_name, MAX_BYTES)
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
    memo = request.store.memo
    for record in manifest.entries:
        shard = Shard(record.shard, request.directory / record.shard)
        try:
            stamp = FileStamp.of(os.stat(shard.path))
        except FileNotFoundError:
            if record.dropped:
                continue
            return f"{record.shard} is absent"
        except OSError as error:
            return f"{record.shard} cannot be looked at: {error.strerror}"
        sha256 = memo.lookup(stamp) or shard.hub_sha256
        if sha256 is None and read_unknown:
            sha256 = shard.sha256(memo)
        if sha256 != record.source_sha256:
            return f"{record.shard} changed, or was never read where it is now"
        if request.store.entry_size(record.key) != record.size:
            return f"the entry of {record.shard} is absent or cut short"
    return None
