"""The manifests of a store."""

from __future__ import annotations

from pathlib import Path

from paroquant_stream.store.manifest import Manifest
from paroquant_stream.store.store import Store


def manifest_of(store: Store) -> tuple[Path, Manifest]:
    (path,) = store.folder("manifests").iterdir()
    return path, Manifest.decode(path.read_bytes())
