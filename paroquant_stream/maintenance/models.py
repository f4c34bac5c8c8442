"""The converted models that a store's manifests and records of removed sources describe.

A manifest and the record of a drop are one model where the manifest continues the record.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

from ..conversion.request import in_place_id, model_id
from ..errors import ManifestError, NewerManifestError
from ..store.drop_record import MAX_RECORD, DropRecord
from ..store.format import DEFAULT_VARIANT, VARIANTS, Variant
from ..store.manifest import MAX_BYTES, EntryRecord, Manifest
from ..store.store import Store
from ..text import shown
from .scan import Found, regular_files

_Decoded = TypeVar("_Decoded")
_ID = r"(?P<id>[0-9a-f]{64}|model-[0-9a-f]{16})"
_MANIFEST = re.compile(_ID + r"(?P<journal>\.dropped)?\.msgpack(?P<removed>\.removed)?")
_RECORD = re.compile(r"(?P<id>[0-9a-f]{64})\.(first|second)\.msgpack(?P<removed>\.removed)?")
Removed = tuple[tuple[Found, frozenset[str]], ...]
"""Manifests and records whose removal was interrupted, with the keys that they named."""


@dataclass(frozen=True)
class Model:
    """A converted model as the store knows it."""

    id: str
    """The name of its manifest."""
    name: str
    """As it is shown: its directory, or `owner/name@revision` in the Hub's cache."""
    directory: Path | None
    """Where it lies or lay; None when the manifest does not say so in a way that can be checked."""
    variant: Variant
    """What it was converted to."""
    manifest: Manifest | None
    """None when its bytes are damaged or of a newer format."""
    files: tuple[Found, ...]
    """Its manifest and, where sources were removed, the two copies of the record of that."""
    records: tuple[EntryRecord, ...]
    last_used: float
    newer: bool = False
    """Written by a newer version, or not readable now: its entries are not known, and stay."""
    moved: bool = False
    """Only a record of removed sources is left: its directory was moved, or holds another model."""

    @property
    def is_record(self) -> bool:
        """Whether there is no manifest of it, only a record of removed sources."""
        return self.id in self.files[0].path.name and self.files[0].path.parent.name == "dropped"

    @property
    def names(self) -> set[str]:
        """Its names: as shown, escaped or not, and without the Hub's revision."""
        repository = {self.name.partition("@")[0]} if _snapshot(self.directory) else set()
        named = {str(self.directory)} if self.directory else set()
        return {self.name, shown(self.name)} | repository | named

    @property
    def is_orphan(self) -> bool:
        """Whether the model directory is known and absent."""
        return self.directory is not None and not os.path.isdir(self.directory)

    @property
    def is_damaged(self) -> bool:
        """Whether its manifest cannot be read: no load uses it, and it names no entry."""
        return not self.records and not self.newer

    @property
    def only_copy(self) -> bool:
        """Whether source shards were dropped, so that their entries are the only copy."""
        return any(record.dropped for record in self.records)


def read_models(store: Store) -> tuple[list[Model], Removed]:
    """Return the models of a store, and the leftovers of interrupted removals."""
    groups: dict[str, list[Found]] = {}
    removed: list[tuple[Found, frozenset[str]]] = []
    for file in regular_files(store.folder("manifests")):
        match = _MANIFEST.fullmatch(file.path.name)
        if match and match["removed"]:
            manifest, _ = _read(file.path)
            removed.append((file, _keys(manifest)))
        elif match:
            groups.setdefault(match["id"], []).append(file)
    models = {name: _model(store, name, files) for name, files in groups.items()}
    records, removed_records = _records(store)
    for drop_id, files in records.items():
        _add_record(store, models, drop_id, files)
    return list(models.values()), (*removed, *removed_records)


def _records(store: Store) -> tuple[dict[str, list[Found]], Removed]:
    """Return the files of drop records by id, and those whose removal was interrupted."""
    groups: dict[str, list[Found]] = {}
    removed: list[tuple[Found, frozenset[str]]] = []
    for file in regular_files(store.folder("dropped")):
        match = _RECORD.fullmatch(file.path.name)
        if match and match["removed"]:
            record, _ = _read_record(match["id"], file.path)
            removed.append((file, _keys(record.manifest if record else None)))
        elif match:
            groups.setdefault(match["id"], []).append(file)
    return groups, tuple(removed)


def _add_record(
    store: Store, models: dict[str, Model], drop_id: str, files: Sequence[Found]
) -> None:
    """Add a record to the model whose manifest continues it, else as a model of its own."""
    read = [_read_record(drop_id, file.path) for file in files]
    record = next((record for record, _ in read if record), None)
    last_used = max(file.mtime_ns for file in files) / 1e9
    if record is None:
        unknown = Model(
            drop_id,
            f"({drop_id[:12]})",
            None,
            DEFAULT_VARIANT,
            None,
            tuple(files),
            (),
            last_used,
            newer=True,
        )
        models[drop_id] = unknown
        return
    entries, directory = record.manifest.entries, record.manifest.directory
    manifest_id = model_id(Path(directory), record.variant)
    if not store.private:
        directory, manifest_id = str(store.root.parent), in_place_id(record.variant)
    known = models.get(manifest_id)
    gone = {(e.shard, e.source_sha256) for e in entries if e.dropped}
    if known and gone <= {(e.shard, e.source_sha256) for e in known.records}:
        merged = {(e.key, e.shard): e for e in (*known.records, *entries)}
        merged |= {(e.key, e.shard): e for e in known.records if e.dropped}
        models[known.id] = replace(
            known, files=(*known.files, *files), records=tuple(merged.values())
        )
        return
    name = f"{_shown_name(drop_id, record.manifest, Path(directory))}#{drop_id[:8]}"
    models[drop_id] = Model(
        drop_id, name, Path(directory), record.variant, record.manifest, tuple(files),
        tuple(entries), last_used, moved=known is not None or not os.path.isdir(directory),
    )  # fmt: skip


def _keys(manifest: Manifest | None) -> frozenset[str]:
    return frozenset(record.key for record in manifest.entries) if manifest else frozenset()


def _model(store: Store, name: str, files: list[Found]) -> Model:
    read = {file.path.name: _read(file.path) for file in files}
    manifests = [manifest for manifest, _ in read.values() if manifest]
    main = read.get(f"{name}.msgpack", (None, False))[0]
    known = main or (manifests[0] if manifests else None)
    directory, variant = _directory(name, known) if known else (None, DEFAULT_VARIANT)
    shown_name = _shown_name(name, known, directory)
    if not store.private:  # the one inside a model directory is named by where it lies
        directory, shown_name = store.root.parent, str(store.root)
        variant = next((v for v in VARIANTS.values() if in_place_id(v) == name), DEFAULT_VARIANT)
    everything = [record for manifest in manifests for record in manifest.entries]
    # of two the last one counts: it says that the source was dropped
    records = {(r.key, r.shard): r for r in sorted(everything, key=lambda r: r.dropped)}
    return Model(
        name,
        shown_name + ("" if variant == DEFAULT_VARIANT else f" ({variant.name})"),
        directory,
        variant,
        main,
        tuple(files),
        tuple(records.values()),
        max(file.mtime_ns for file in files) / 1e9,
        any(newer for _, newer in read.values()),
    )


def _read(path: Path) -> tuple[Manifest | None, bool]:
    """Read a manifest, and tell whether it may be sound though unread: newer, or unreadable."""
    return _decoded(path, MAX_BYTES, Manifest.decode)


def _read_record(drop_id: str, path: Path) -> tuple[DropRecord | None, bool]:
    """Read a record of removed sources, as `_read` does."""
    return _decoded(path, MAX_RECORD, partial(DropRecord.decode, drop_id))


def _decoded(
    path: Path, limit: int, decode: Callable[[bytes], _Decoded]
) -> tuple[_Decoded | None, bool]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:  # removed meanwhile
        return None, False
    except OSError:
        return None, True
    try:
        return decode(data), False
    except NewerManifestError:
        return None, True
    except ManifestError:
        return None, False


def _directory(name: str, manifest: Manifest) -> tuple[Path | None, Variant]:
    """Return model directory and variant, if the manifest's name is their hash."""
    candidates = [Path(manifest.directory)] if manifest.directory else []
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a loop of links, no home, NUL
        candidates.append(Path(manifest.model).expanduser().resolve())
    for path, variant in product(candidates, VARIANTS.values()):
        if model_id(path, variant) == name:
            return path, variant
    return None, DEFAULT_VARIANT


def _shown_name(name: str, manifest: Manifest | None, directory: Path | None) -> str:
    if directory is None:
        return f"{manifest.model} ({name[:12]})" if manifest else f"({name[:12]})"
    if repository := _snapshot(directory):
        return f"{repository}@{directory.name[:8]}"
    return str(directory)


def _snapshot(directory: Path | None) -> str | None:
    """Return `owner/name` of a directory `models--owner--name/snapshots/<commit>`."""
    if directory is None or directory.parent.name != "snapshots":
        return None
    name = directory.parent.parent.name
    return name[8:].replace("--", "/", 1) if name.startswith("models--") else None
