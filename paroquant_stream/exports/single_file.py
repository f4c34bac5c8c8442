"""`converted_mlx.safetensors` in a model directory: a whole converted model in one file.

A file of this package has the entries' tensors under the checkpoint's names, stacks whole, and in
`__metadata__`:

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
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.shard import SHARD_NAME, Shard
from ..errors import MalformedFileError
from ..files.descriptor import closing, pread_exactly
from ..files.hashing import hash_parts
from ..files.strict_json import strict_json
from ..files.tensor_header import Header, read_header
from ..store.format import TRANSFORM
from ..version import __version__

NAME = "converted_mlx.safetensors"
MAX_SHARDS = 10_000  # each costs a system call; the largest models have some 200
_WRITER = "paroquant_stream"
NO_DIGEST = "0" * 32
_DIGEST = re.compile("[0-9a-f]{32}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """What this package's metadata says of a file."""

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
    """Return the metadata of a file made from shards with these SHA-256, without its digest."""
    return {
        "writer": f"{_WRITER} {__version__}",
        "names": "checkpoint",
        "transform": TRANSFORM,
        "sources": json.dumps(sources, sort_keys=True),
        "xxh3": NO_DIGEST,
    }


def with_digest(header: bytes, digest: str, before: str = NO_DIGEST) -> bytes:
    """Replace the digest `before` in a header's bytes.

    Nothing else can look like it: quotes inside of a JSON string have a backslash.
    """
    return header.replace(f'"xxh3":"{before}"'.encode(), f'"xxh3":"{digest}"'.encode(), 1)


def hash_single(fd: int, header_size: int, label: str, digest: str = NO_DIGEST) -> str:
    """Hash the file at `fd` with zeros in the place of the digest in its header.

    Returns:
        XXH3-128 in hex.

    Raises:
        UnreadableFileError: The system cannot read it.
        SourceChangedError: It became shorter meanwhile.
    """
    header = pread_exactly(fd, 0, header_size, label)
    return hash_parts(with_digest(header, NO_DIGEST, digest), fd, label)


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[SingleFile | None]:
    """Open the single file in a model directory during the body; None if there is none.

    Raises:
        MalformedFileError: Its header is not valid, or its metadata is this package's and damaged.
        CheckpointError: It is a link that leads out of the directory.
    """
    shard = Shard(NAME, directory / NAME)
    if not os.path.lexists(shard.path):
        yield None
        return
    with closing(shard.open()) as fd:
        header = read_header(fd, str(shard.path))
        yield SingleFile(shard.path, fd, header, _read_origin(header.metadata, str(shard.path)))


def _read_origin(metadata: Mapping[str, str], label: str) -> Origin | None:
    """Read this package's metadata; None when the file has none. Raises MalformedFileError."""
    if not metadata.get("writer", "").startswith(_WRITER):
        return None
    if metadata.get("names") != "checkpoint":
        raise MalformedFileError(f"{label}: written by a newer version of paroquant_stream")
    text = metadata.get("sources", "").encode("utf-8", "surrogatepass")  # which it then refuses
    sources = strict_json(text, f"{label}, its sources")
    if type(sources) is not dict or not 0 < len(sources) <= MAX_SHARDS:
        raise MalformedFileError(f"{label}: its sources are no map of 1 to {MAX_SHARDS:,} shards")
    for shard, sha256 in sources.items():
        if not re.fullmatch(SHARD_NAME, shard) or not _SHA256.fullmatch(str(sha256)):
            raise MalformedFileError(
                f"{label}: its sources name {shard[:80]!r}, no shard and SHA-256"
            )
    digest = metadata.get("xxh3", "")
    if not _DIGEST.fullmatch(digest):
        raise MalformedFileError(f"{label}: its xxh3 is no digest")
    return Origin(metadata.get("transform", ""), sources, digest)
