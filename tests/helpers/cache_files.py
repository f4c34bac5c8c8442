"""The files of a cache."""

from __future__ import annotations

from pathlib import Path


def entries(cache: Path) -> dict[str, bytes]:
    """Map the file name of each entry to its bytes."""
    return {path.name: path.read_bytes() for path in cache.rglob("v1/entries/*/*.safetensors")}


def temps(cache: Path) -> list[str]:
    """List the names of the temporary files."""
    return [path.name for path in (cache / "v1" / "tmp").iterdir()]
