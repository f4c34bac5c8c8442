"""What lies in a store: models, the entries they share, and what nobody names.

Only names, `lstat` and manifests are read. Nothing below the store's own directories is followed:
a link, a directory or a pipe where a file belongs is none of ours and is neither counted nor
removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..descriptor import FileStamp
from ..errors import ManifestError, NewerManifest
from ..manifest import MAX_BYTES, EntryRecord, Manifest
from ..report import shown
from ..request import model_id
from ..store import Store, is_dead
from ..task import DTYPES, Dtype
from .foreign import Foreign, foreign_directories
from .found import Found, regular_files

SOURCE: Dtype = "source"
_ID = r"(?P<id>[0-9a-f]{64}|model-[0-9a-f]{16})"
_MANIFEST = re.compile(_ID + r"(?P<journal>\.dropped)?\.msgpack(?P<removed>\.removed)?")
_ENTRY = re.compile(r"(?P<key>[0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Model:
    """A converted model as the store knows it."""

    id: str
    """The name of its manifest."""
    name: str
    """As it is shown: its directory, or `owner/name@revision` in the Hub's cache."""
    directory: Path | None
    """Where it lies or lay; None when the manifest does not say so in a way that can be checked."""
    dtype: Dtype
    """What it was converted to."""
    manifest: Manifest | None
    """None when its bytes are damaged or of a newer format."""
    files: tuple[Found, ...]
    """Its manifest and, of a run that drops sources and is not done, the journal."""
    records: tuple[EntryRecord, ...]
    last_used: float
    newer: bool = False
    """Written by a newer version, or not readable now: its entries are not known, and stay."""

    @property
    def names(self) -> set[str]:
        """What it may be called: as shown, escaped or not, and without the Hub's revision."""
        repository = {self.name.partition("@")[0]} if _snapshot(self.directory) else set()
        named = {str(self.directory)} if self.directory else set()
        return {self.name, shown(self.name)} | repository | named

    @property
    def is_orphan(self) -> bool:
        """Whether the model directory is known and is not there."""
        return self.directory is not None and not os.path.isdir(self.directory)

    @property
    def is_damaged(self) -> bool:
        """Whether nobody can read it: a miss for every load, with no entry that it names."""
        return not self.records and not self.newer

    @property
    def only_copy(self) -> bool:
        """Whether source shards were dropped, so that their entries are all that is left."""
        return any(record.dropped for record in self.records)


@dataclass(frozen=True)
class Inventory:
    """Everything that lies in a store, at one time."""

    store: Store
    time: float
    models: tuple[Model, ...]
    entries: dict[str, Found]
    """Every entry by key."""
    removed: tuple[tuple[Found, frozenset[str]], ...]
    """Manifests of models whose removal was cut off, with the keys that they named."""
    dead_temps: tuple[Found, ...]
    """What dead runs were writing, and entries that were found damaged and taken out of use."""
    headers: tuple[Found, ...]
    """Kept headers of dropped shards that no manifest names."""
    memos: tuple[Found, ...]
    """Digests of files that are neither an entry nor a shard of a model."""
    foreign: tuple[Foreign, ...]

    @property
    def claims(self) -> dict[str, set[str]]:
        """Model ids by the key of each entry that they name."""
        claims: dict[str, set[str]] = {}
        for model in self.models:
            for record in model.records:
                claims.setdefault(record.key, set()).add(model.id)
        return claims

    @property
    def unclaimed(self) -> dict[str, Found]:
        """Entries that no manifest names: of a conversion that is not done, or was cut off."""
        claims = self.claims
        return {key: file for key, file in self.entries.items() if key not in claims}

    @property
    def size(self) -> int:
        """Bytes of everything that is listed."""
        files = [*self.entries.values(), *self.dead_temps, *self.headers, *self.memos]
        files += [file for model in self.models for file in model.files]
        files += [file for file, _ in self.removed]
        return sum(f.size for f in files) + sum(foreign.size for foreign in self.foreign)

    def entry_bytes(self, model: Model) -> int:
        """Bytes of the model's entries, shared ones too."""
        keys = {record.key for record in model.records}
        return sum(self.entries[key].size for key in keys if key in self.entries)


def take_inventory(store: Store, now: float | None = None) -> Inventory:
    """What lies in the store; an absent store is empty, and nothing is written."""
    now = time.time() if now is None else now
    models, removed = _models(store)
    entries = dict(_entries(store))
    return Inventory(
        store,
        now,
        tuple(sorted(models, key=lambda model: model.name)),
        entries,
        removed,
        tuple(_dead_temps(store, now)),
        tuple(_unnamed_headers(store, models)),
        tuple(_unknown_memos(store, models, entries.values())),
        tuple(foreign_directories(store.root)) if store.private else (),
    )


def claimed_keys(store: Store) -> set[str] | None:
    """The keys that manifests name now; None when some manifest cannot tell."""
    models, _ = _models(store)
    if any(model.newer for model in models):
        return None
    return {record.key for model in models for record in model.records}


def _models(store: Store) -> tuple[list[Model], tuple[tuple[Found, frozenset[str]], ...]]:
    groups: dict[str, list[Found]] = {}
    removed: list[tuple[Found, frozenset[str]]] = []
    for file in regular_files(store.folder("manifests")):
        match = _MANIFEST.fullmatch(file.path.name)
        if match and match["removed"]:
            manifest, _ = _read(file.path)
            keys = (record.key for record in manifest.entries) if manifest else ()
            removed.append((file, frozenset(keys)))
        elif match:
            groups.setdefault(match["id"], []).append(file)
    return [_model(name, files) for name, files in groups.items()], tuple(removed)


def _model(name: str, files: list[Found]) -> Model:
    read = {file.path.name: _read(file.path) for file in files}
    manifests = [manifest for manifest, _ in read.values() if manifest]
    main = read.get(f"{name}.msgpack", (None, False))[0]
    told = main or (manifests[0] if manifests else None)
    directory, dtype = _directory(name, told) if told else (None, SOURCE)
    everything = [record for manifest in manifests for record in manifest.entries]
    # the last of two wins: the journal's, which knows that the source is gone
    records = {(r.key, r.shard): r for r in sorted(everything, key=lambda r: r.dropped)}
    return Model(
        name,
        _shown_name(name, told, directory) + ("" if dtype == SOURCE else f" ({dtype})"),
        directory,
        dtype,
        main,
        tuple(files),
        tuple(records.values()),
        max(file.mtime_ns for file in files) / 1e9,
        any(newer for _, newer in read.values()),
    )


def _read(path: Path) -> tuple[Manifest | None, bool]:
    """The manifest in a file, and whether it may be sound all the same: newer, or unreadable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:  # removed meanwhile
        return None, False
    except OSError:
        return None, True
    try:
        return Manifest.decode(data), False
    except NewerManifest:
        return None, True
    except ManifestError:
        return None, False


def _directory(name: str, manifest: Manifest) -> tuple[Path | None, Dtype]:
    """The model directory and the dtype, if the manifest's name is their hash; before 1.1 as the
    user named it.
    """
    candidates = [Path(manifest.directory)] if manifest.directory else []
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a loop of links, no home, NUL
        candidates.append(Path(manifest.model).expanduser().resolve())
    for path, dtype in product(candidates, DTYPES):
        if model_id(path, dtype) == name:
            return path, dtype
    return None, SOURCE


def _shown_name(name: str, manifest: Manifest | None, directory: Path | None) -> str:
    if directory is None:
        return f"{manifest.model} ({name[:12]})" if manifest else f"({name[:12]})"
    if repository := _snapshot(directory):
        return f"{repository}@{directory.name[:8]}"
    return str(directory)


def _snapshot(directory: Path | None) -> str | None:
    """`owner/name` of a directory `models--owner--name/snapshots/<commit>` of the Hub's cache."""
    if directory is None or directory.parent.name != "snapshots":
        return None
    name = directory.parent.parent.name
    return name[8:].replace("--", "/", 1) if name.startswith("models--") else None


def _entries(store: Store) -> Iterator[tuple[str, Found]]:
    with contextlib.suppress(OSError):
        for prefix in sorted(os.scandir(store.folder("entries")), key=lambda entry: entry.name):
            if prefix.is_dir(follow_symlinks=False):
                for file in regular_files(Path(prefix.path)):
                    match = _ENTRY.fullmatch(file.path.name)
                    if match and match["key"][:2] == prefix.name:
                        yield match["key"], file


def _dead_temps(store: Store, now: float) -> Iterator[Found]:
    for file in regular_files(store.folder("tmp")):
        if is_dead(file.path.name, now - file.mtime_ns / 1e9):
            yield file


def _unnamed_headers(store: Store, models: Iterable[Model]) -> Iterator[Found]:
    named = {r.source_sha256 for model in models for r in model.records if r.dropped}
    for file in regular_files(store.folder("headers")):
        if re.fullmatch("[0-9a-f]{64}", file.path.name) and file.path.name not in named:
            yield file


def _unknown_memos(
    store: Store, models: Iterable[Model], entries: Iterable[Found]
) -> Iterator[Found]:
    known = {store.memo.path(file.stamp).name for file in entries}
    for model in models:
        directory = model.directory or Path("/dev/null")
        for record in model.records:
            with contextlib.suppress(OSError):
                stamp = FileStamp.of(os.stat(directory / record.shard))
                known.add(store.memo.path(stamp).name)
    for file in regular_files(store.folder("memo")):
        if file.path.name not in known:
            yield file
