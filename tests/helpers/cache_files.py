"""The files of a cache."""

from __future__ import annotations

import os
from pathlib import Path

from paroquant_stream import convert_checkpoint
from paroquant_stream.files.tensor_header import read_header
from paroquant_stream.store.entry_digest import hash_entry
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import flip


def entries(cache: Path) -> dict[str, bytes]:
    """Map the file name of each entry to its bytes."""
    return {path.name: path.read_bytes() for path in cache.rglob("v1/entries/*/*.safetensors")}


def digest_of(path: Path) -> str:
    """Return the digest of an entry as its bytes are."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return hash_entry(fd, read_header(fd, path.name).tensors, path.name, "tree:")
    finally:
        os.close(fd)


def temps(cache: Path) -> list[str]:
    """List the names of the temporary files."""
    return [path.name for path in (cache / "v1" / "tmp").iterdir()]


def damage_entry(model: Path) -> Path:
    """Flip a bit of a model's first entry in the user's cache, and return its path."""
    path = cache_store().entry_path(convert_checkpoint(model).entries[0].key)
    flip(path, path.stat().st_size - 1)
    return path
