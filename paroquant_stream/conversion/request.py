"""What is asked for: which model, into which store, which part of it; and whether its manifest
still holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..checkpoint.checkpoint import Shard, config_digest
from ..checkpoint.hub import locate
from ..errors import ParoquantStreamError
from ..files.descriptor import closing
from ..files.digest_cache import Memo
from ..plan.task import CAST_VERSION, DTYPES, TRANSFORM, Dtype
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store, cache_store

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..checkpoint.prefetch import Remote
    from ..execution.slots import Places


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


Parallel = Literal["pipeline", "tensor"]


@dataclass(frozen=True)
class Split:
    """What is asked for of a model; by default all of it."""

    layers: range | None = None
    """Only these transformer layers."""
    group: Any = None
    """An `mx.distributed.Group`: only what this rank has of a model split over all of its ranks."""
    parallel: Parallel = "pipeline"
    """How the group splits it: by layers, or every layer's tensors."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no model has."""
        if self.layers is not None and self.group is not None:
            raise ValueError("layers and group: a group has its own layers; give one of the two")
        if self.parallel not in get_args(Parallel):
            raise ValueError(f"parallel is pipeline or tensor, not {self.parallel!r}")
        found = self.layers
        if found is not None and not (type(found) is range and found and found.step == 1):
            raise ValueError(f"layers is a range(first, beyond the last), not {found!r}")
        if found is not None and found.start < 0:
            raise ValueError(f"layers start at 0, not {found.start}")

    @property
    def by_tensors(self) -> bool:
        """Whether a part of every layer is asked for."""
        return self.group is not None and self.parallel == "tensor"

    @property
    def by_layers(self) -> bool:
        """Whether some layers are asked for, and others not."""
        return not self.by_tensors and (self.layers is not None or self.group is not None)


WHOLE = Split()
IN_PLACE = "mlx"
"""The directory inside a model directory in which a conversion can be shipped with the model."""
Needed = Callable[[Manifest], Collection[EntryRecord]]
"""The entries of a manifest from which a part of the model is read."""


def model_id(directory: Path, dtype: Dtype = "source") -> str:
    """The name of the manifest, in a cache, of the model in this resolved directory."""
    return hashlib.sha256(os.fsencode(directory) + b"\0" + _options(dtype)).hexdigest()


def _options(dtype: Dtype) -> bytes:
    """What the user chose that changes an entry."""
    cast = {} if dtype == "source" else {"cast": CAST_VERSION}
    return json.dumps({"dtype": dtype, **cast}, sort_keys=True).encode()


def read_manifest(request: Request) -> Manifest | None:
    """The manifest of an earlier conversion, or None; whatever is wrong with it, it is None."""
    return request.store.load_manifest(request.manifest_name)


def staleness(
    request: Request,
    manifest: Manifest,
    read_unknown: bool = False,
    needed: Needed | None = None,
) -> str | None:
    """Why the manifest does not hold for the model as it is now, or None when it surely does.

    A shard whose digest no memo knows counts as changed, unless `read_unknown`: then it is hashed.
    Of an entry that is not `needed` neither it nor its shard has to be there; a shard that is must
    be the one it was made from, for it may have lent parts.
    """
    if manifest.transform != TRANSFORM:
        return "made by another version"
    if manifest.config_sha256 != config_digest(request.directory):
        return "config.json or the index changed"
    wanted = {record.key for record in (needed(manifest) if needed else manifest.entries)}
    for record in manifest.entries:
        shard = Shard(record.shard, request.directory / record.shard)
        may_lack = record.dropped or record.key not in wanted
        if not (may_lack and not os.path.exists(shard.path)):
            reason = source_staleness(request.store.memo, shard, record.source_sha256, read_unknown)
            if reason:
                return reason
        if record.key in wanted and request.store.entry_size(record.key) != record.size:
            return f"the entry of {record.shard} is absent or cut short"
    return None


def source_staleness(
    memo: Memo, shard: Shard, expected: str, read_unknown: bool = False
) -> str | None:
    """Why a shard's SHA-256 is not the `expected` one, or None when it surely is."""
    if not os.path.exists(shard.path):
        return f"{shard.name} is absent"
    try:
        fd = shard.open()
    except ParoquantStreamError as error:
        return f"{shard.name} cannot be looked at: {error}"
    with closing(fd):
        sha256 = shard.known_sha256(memo, fd)
        if sha256 is None and read_unknown:
            sha256 = shard.sha256(memo)
    if sha256 != expected:
        return f"{shard.name} changed, or was never read where it is now"
    return None


def default_jobs() -> int:
    """Workers where nothing is said: one a core, at most 8."""
    return min(8, os.cpu_count() or 1)


def make_request(
    model_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    in_place: bool = False,
    force: bool = False,
    jobs: int | None = None,
    revision: str | None = None,
    drop_source: bool = False,
    dtype: Dtype = "source",
    executor: Executor | None = None,
) -> Request:
    """The request for converting `model_path` with these options; of a model named by a Hub id it
    downloads the config, the index and the tokenizer, no shard.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    directory, remote = locate(model_path, revision)
    if jobs is None and executor:
        from ..execution.executors import width  # here, because a run without work needs none of it

        jobs = width(executor)
    jobs = jobs or default_jobs()
    store = Store(directory / IN_PLACE, private=False) if in_place else cache_store(cache_dir)
    return Request(
        str(model_path),
        directory,
        store,
        in_place,
        force,
        jobs,
        remote,
        drop_source,
        dtype,
        executor,
    )
