"""What a store holds: models, the entries they share, and files that no model uses.

Only names, `lstat` and manifests are read. Nothing below the store's own directories is followed: a
link, a directory or a pipe in the place of a file is neither counted nor removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import temp_files
from ..files.descriptor import FileStamp
from ..store.lock import locks_exclude
from ..store.store import Store
from .models import Model, read_models
from .paroquant_cache import Foreign, foreign_directories
from .scan import Found, regular_files

_ENTRY = re.compile(r"(?P<key>[0-9a-f]{64})\.safetensors")
_DIGEST = re.compile(r"(?P<key>[0-9a-f]{64})\.digest")
_DAMAGED = re.compile(r"(?P<key>[0-9a-f]{64})\.\d+\.safetensors")


@dataclass(frozen=True)
class Inventory:
    """Everything that lies in a store, at one time."""

    store: Store
    time: float
    models: tuple[Model, ...]
    entries: dict[str, Found]
    """Every entry by key."""
    removed: tuple[tuple[Found, frozenset[str]], ...]
    """Manifests of models whose removal was interrupted, with the keys that they named."""
    dead_temps: tuple[Found, ...]
    """Temporary files of dead runs."""
    headers: tuple[Found, ...]
    """Headers of dropped shards, as older versions kept them, that no manifest names."""
    damaged: dict[str, Found]
    """Damaged entries that nothing could make again when they were found, by file name."""
    digests: dict[str, Found]
    """The digest that its writer took of each entry, by key."""
    memos: tuple[Found, ...]
    """Remembered digests of files that are neither an entry nor a shard of a model."""
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
        """Entries that no manifest names: of a conversion that is running or was interrupted."""
        claims = self.claims
        return {key: file for key, file in self.entries.items() if key not in claims}

    @property
    def healed(self) -> tuple[Found, ...]:
        """Damaged entries whose key has an entry again."""
        return tuple(f for name, f in self.damaged.items() if name[:64] in self.entries)

    @property
    def lone_digests(self) -> tuple[Found, ...]:
        """Digests that lie beside no entry."""
        return tuple(file for key, file in self.digests.items() if key not in self.entries)

    @property
    def size(self) -> int:
        """Bytes of everything that is listed."""
        files = [*self.entries.values(), *self.dead_temps, *self.headers, *self.memos]
        files += [*self.damaged.values(), *self.digests.values()]
        files += [file for model in self.models for file in model.files]
        files += [file for file, _ in self.removed]
        return sum(f.size for f in files) + sum(foreign.size for foreign in self.foreign)

    def entry_bytes(self, model: Model) -> int:
        """Bytes of the model's entries, shared ones too."""
        keys = {record.key for record in model.records}
        return sum(self.entries[key].size for key in keys if key in self.entries)


def take_inventory(store: Store, now: float | None = None) -> Inventory:
    """List what a store holds; an absent store is empty, and nothing is written.

    Args:
        store: The store.
        now: Seconds since 1970; None for the clock's time.
    """
    now = time.time() if now is None else now
    models, removed = read_models(store)
    entries, digests = _entries(store)
    return Inventory(
        store,
        now,
        tuple(sorted(models, key=lambda model: model.name)),
        entries,
        removed,
        tuple(_dead_temps(store)),
        tuple(_unnamed_headers(store, models)),
        {f.path.name: f for f in regular_files(store.folder("damaged")) if _is_damaged(f)},
        digests,
        tuple(_unknown_memos(store, models, entries.values())),
        tuple(foreign_directories(store.root)) if store.private else (),
    )


def claimed_keys(store: Store) -> set[str] | None:
    """Return the keys that manifests name now; None when some manifest is of a newer version."""
    models, _ = read_models(store)
    if any(model.newer for model in models):
        return None
    return {record.key for model in models for record in model.records}


def _entries(store: Store) -> tuple[dict[str, Found], dict[str, Found]]:
    """Return the entries, and the digests beside them, by key."""
    entries: dict[str, Found] = {}
    digests: dict[str, Found] = {}
    with contextlib.suppress(OSError):
        for prefix in sorted(os.scandir(store.folder("entries")), key=lambda entry: entry.name):
            if prefix.is_dir(follow_symlinks=False):
                for file in regular_files(Path(prefix.path)):
                    for found, form in ((entries, _ENTRY), (digests, _DIGEST)):
                        match = form.fullmatch(file.path.name)
                        if match and match["key"][:2] == prefix.name:
                            found[match["key"]] = file
    return entries, digests


def _is_damaged(file: Found) -> bool:
    return _DAMAGED.fullmatch(file.path.name) is not None


def _dead_temps(store: Store) -> Iterator[Found]:
    with contextlib.suppress(OSError), store.opened("tmp") as tmp:
        locks = locks_exclude(tmp)
        for file in regular_files(tmp.path):
            name = file.path.name
            if temp_files.is_temp(name) and temp_files.is_dead(tmp, name, locks):
                yield file


def _unnamed_headers(store: Store, models: Iterable[Model]) -> Iterator[Found]:
    named = {r.source_sha256 for model in models for r in model.records if r.dropped}
    for file in regular_files(store.folder("headers")):
        if re.fullmatch("[0-9a-f]{64}", file.path.name) and file.path.name not in named:
            yield file


def _unknown_memos(
    store: Store, models: Iterable[Model], entries: Iterable[Found]
) -> Iterator[Found]:
    known = {store.digest_cache.path(file.stamp).name for file in entries}
    for model in models:
        directory = model.directory or Path("/dev/null")
        for record in model.records:
            with contextlib.suppress(OSError):
                stamp = FileStamp.of(os.stat(directory / record.shard))
                known.add(store.digest_cache.path(stamp).name)
    for file in regular_files(store.folder("memo")):
        if file.path.name not in known:
            yield file
