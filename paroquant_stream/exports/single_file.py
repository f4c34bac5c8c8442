"""`converted_mlx.safetensors` in a model directory: a whole converted model in one file.

Ours has the entries' tensors under the checkpoint's names, stacks whole, and in `__metadata__`:

    format     mlx
    writer     paroquant_stream <version>
    names      checkpoint
    transform  as in a manifest
    sources    JSON text: shard name -> SHA-256 of what was converted
    xxh3       XXH3-128 of the file with 32 zeros in this place

Pull request 50 of z-lab/paroquant writes one of this name too, with none of that: the model's own
names, embeddings not quantized, perhaps no vision tower, and nothing that tells what it was made
from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.checkpoint import SHARD_NAME, Shard, shard_names
from ..conversion.request import Request, source_staleness
from ..errors import CheckpointError, MalformedFile, ParoquantStreamError, StoreError
from ..files.descriptor import closing, pread_exactly
from ..files.hashing import hash_parts
from ..files.strict_json import strict_json
from ..files.tensor_header import Header, read_header
from ..plan.task import TRANSFORM
from ..version import __version__

NAME = "converted_mlx.safetensors"
MAX_SHARDS = 10_000  # each costs a look at the disk; the largest models have some 200
_WRITER = "paroquant_stream"
NO_DIGEST = "0" * 32
_DIGEST = re.compile("[0-9a-f]{32}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """What our metadata says of a file."""

    transform: str
    sources: Mapping[str, str]
    """Shard name -> SHA-256 of what was converted."""
    digest: str
    """XXH3-128, 32 hex digits."""


@dataclass(frozen=True)
class SingleFile:
    """An open single file with a sound header."""

    path: Path
    fd: int
    header: Header
    origin: Origin | None
    """None: the form of pull request 50."""


def metadata_of(sources: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file made from shards with these SHA-256, its digest not yet known."""
    return {
        "writer": f"{_WRITER} {__version__}",
        "names": "checkpoint",
        "transform": TRANSFORM,
        "sources": json.dumps(sources, sort_keys=True),
        "xxh3": NO_DIGEST,
    }


def with_digest(header: bytes, digest: str, before: str = NO_DIGEST) -> bytes:
    """The header's bytes with its digest `before` replaced; no other place can look like it, for
    quotes inside of a JSON string have a backslash.
    """
    return header.replace(f'"xxh3":"{before}"'.encode(), f'"xxh3":"{digest}"'.encode(), 1)


def hash_single(fd: int, header_size: int, label: str, digest: str = NO_DIGEST) -> str:
    """XXH3-128 of the file at `fd` with zeros in the place of the `digest` that its header has.

    Raises UnreadableFile, SourceChanged when the file becomes shorter meanwhile.
    """
    header = pread_exactly(fd, 0, header_size, label)
    return hash_parts(with_digest(header, NO_DIGEST, digest), fd, label)


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[SingleFile | None]:
    """The single file in a model directory, open during the body, or None if there is none.

    Raises MalformedFile for a header that is not valid and for metadata that is ours and damaged;
    CheckpointError for a link that leads out of the directory.
    """
    shard = Shard(NAME, directory / NAME)
    if not os.path.lexists(shard.path):
        yield None
        return
    with closing(shard.open()) as fd:
        header = read_header(fd, str(shard.path))
        yield SingleFile(shard.path, fd, header, _read_origin(header.metadata, str(shard.path)))


def _read_origin(metadata: Mapping[str, str], label: str) -> Origin | None:
    """What metadata of ours says; None when it is not ours. Raises MalformedFile."""
    if not metadata.get("writer", "").startswith(_WRITER):
        return None
    if metadata.get("names") != "checkpoint":
        raise MalformedFile(f"{label}: written by a newer version of paroquant_stream")
    text = metadata.get("sources", "").encode("utf-8", "surrogatepass")  # which it then refuses
    sources = strict_json(text, f"{label}, its sources")
    if type(sources) is not dict or not 0 < len(sources) <= MAX_SHARDS:
        raise MalformedFile(f"{label}: its sources are no map of 1 to {MAX_SHARDS:,} shards")
    for shard, sha256 in sources.items():
        if not SHARD_NAME.fullmatch(shard) or not _SHA256.fullmatch(str(sha256)):
            raise MalformedFile(f"{label}: its sources name {shard[:80]!r}, no shard and SHA-256")
    digest = metadata.get("xxh3", "")
    if not _DIGEST.fullmatch(digest):
        raise MalformedFile(f"{label}: its xxh3 is no digest")
    return Origin(metadata.get("transform", ""), sources, digest)


def check_usable(file: SingleFile, request: Request, full: bool) -> None:
    """Raises CheckpointError when a single file must not be used for the model as it is now.

    Sources that are present are compared with what was converted, hashed when no memo knows them;
    absent ones are as they were. Then the file's own digest, unless its stat is known and not
    `full`.
    """
    if reason := _why_unused(file, request, full):
        raise CheckpointError(f"{file.path}: {reason}; remove it, or have it written anew")


def _why_unused(file: SingleFile, request: Request, full: bool) -> str | None:
    named, removed = shard_names(request.directory), _removed_sources(request)
    if file.origin is None:
        present = [name for name in named if os.path.lexists(request.directory / name)]
        if present:
            return f"nothing in it tells whether it was made from {present[0]}, which is there too"
        if removed:
            return "nothing in it tells whether it was made from the shards that were removed"
        return None
    if file.origin.transform != TRANSFORM:
        return "made by another version"
    request.store.check_owner()  # for its memos are believed
    with contextlib.suppress(StoreError):  # without a place for memos, everything is hashed again
        request.store.create()
    for name in sorted({*named, *file.origin.sources}):
        shard = Shard(name, request.directory / name)
        if not os.path.exists(shard.path):
            if removed.get(name, file.origin.sources.get(name)) != file.origin.sources.get(name):
                return f"made from another {name} than the one that --drop-source removed"
            continue
        if name not in file.origin.sources:
            return f"{name} was not there when it was made"
        memo, expected = request.store.memo, file.origin.sources[name]
        if reason := source_staleness(memo, shard, expected, read_unknown=True):
            return reason
    return _damage(file, file.origin, request, full)


def _removed_sources(request: Request) -> dict[str, str]:
    """SHA-256 of shards that `--drop-source` removed, by name, as cache and `mlx/` know them."""
    from ..conversion.find_dropped import find_dropped

    beside = replace(request.store, root=request.directory / "mlx", private=False, read_only=True)
    found: dict[str, str] = {}
    for place in (replace(request, store=beside, in_place=True), request):
        with contextlib.suppress(ParoquantStreamError):
            drop = find_dropped(place)
            entries = drop.manifest.entries if drop else ()
            found |= {entry.shard: entry.source_sha256 for entry in entries if entry.dropped}
    return found


def _damage(file: SingleFile, origin: Origin, request: Request, full: bool) -> str | None:
    label, memo = str(file.path), request.store.memo
    if not full and memo.lookup(file.fd) == origin.digest:
        return None
    before = memo.begin(file.fd)
    header_size = file.header.tensors[0].start if file.header.tensors else file.header.size
    digest = hash_single(file.fd, header_size, label, origin.digest)
    if digest != origin.digest:
        return f"damaged: expected XXH3 {origin.digest}, found {digest}"
    memo.remember(file.fd, before, digest)
    return None
