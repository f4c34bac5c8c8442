"""The model that tests push to a Hub on loopback, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

from paroquant_stream.store.manifest import Manifest
from tests.helpers.cache_files import digest_of

REPO = "owner/name"


COUNT = 6


def digests(manifest: Manifest) -> list[str]:
    """List the digests of the entries in a manifest."""
    return [record.digest for record in manifest.entries]


def digests_in(cache: Path) -> set[str]:
    """Hash the entries of a cache."""
    return {digest_of(path) for path in cache.rglob("entries/*/*.safetensors")}


def names(count: int = COUNT) -> list[str]:
    """List the names of the shards."""
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def size_of(*roots: Path) -> int:
    """Add up the bytes of entries and blobs below some directories."""
    files = [p for root in roots for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(path.stat().st_size for path in files if "safetensors" in path.name
               or path.parent.name == "blobs")  # fmt: skip
