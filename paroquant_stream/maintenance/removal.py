"""Executes a plan of `prune`.

    manifest, records renamed to <name>.removed -> entries that no other names -> those files

So a manifest never names entries that are being removed, and an interrupted removal is finished by
the next one. Before every entry it is checked again that no conversion runs: one that begins
meanwhile takes seconds until it names its first. Where locks do nothing, an entry may be removed
that it is about to name; the next load then finds it absent and converts that shard again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import StoreError
from ..files.atomic_file import sync_directory
from .activity import demand_quiet
from .inventory import claimed_keys
from .paroquant_cache import remove_foreign
from .prune import PrunePlan
from .scan import Found


@dataclass(frozen=True)
class Removal:
    """One model that would be removed, or leftovers of one kind."""

    what: str
    """The model's name, or the kind of files."""
    why: str
    size: int
    """Bytes that are freed; entries that another model uses stay, and count nothing."""
    files: tuple[Path, ...]


def removals_of(plan: PrunePlan) -> list[Removal]:
    """Group the files of a plan: each is in one removal, so that the sizes add up."""
    entries, removals = dict(plan.entries), []
    for model in plan.models:
        keys = dict.fromkeys(record.key for record in model.records)
        own = [key for key in keys if key in entries]
        files = [*_with_digests(plan, own), *model.files]
        removals.append(_removal(model.name, plan.reasons[model.id], files))
        for key in own:
            del entries[key]
    removals += [
        Removal(str(f.path), "of paroquant's own cache", f.size, tuple(x.path for x in f.files))
        for f in plan.foreign
    ]
    unclaimed = [key for key in entries if key in plan.unclaimed]
    cut_off = [key for key in entries if key not in plan.unclaimed]
    leftovers = [
        ("entries", "no model names them", _with_digests(plan, unclaimed)),
        (
            "entries, manifests",
            "an earlier removal was interrupted",
            [*_with_digests(plan, cut_off), *plan.remains],
        ),
        ("temporary files", "their runs are dead", plan.dead_temps),
        ("headers", "no model names the dropped shards that they are of", plan.headers),
        ("damaged entries", "they were made again", plan.healed),
        ("digests", "their entries are gone", plan.digests),
        ("remembered digests", "their files are gone", plan.memos),
    ]
    removals += [_removal(what, why, files) for what, why, files in leftovers if files]
    return removals


def _with_digests(plan: PrunePlan, keys: Iterable[str]) -> list[Found]:
    """Return these entries, and the digests beside them."""
    keys, digests = list(keys), plan.inventory.digests
    return [*(plan.entries[key] for key in keys), *(digests[k] for k in keys if k in digests)]


def _removal(what: str, why: str, files: Sequence[Found]) -> Removal:
    return Removal(what, why, sum(file.size for file in files), tuple(f.path for f in files))


def execute(plan: PrunePlan) -> int:
    """Remove what the plan names and is still as the plan found it.

    Returns:
        The bytes freed.

    Raises:
        StoreError: A conversion is running or begins meanwhile, or a file cannot be removed. What
            was removed before stays removed, and the same call again resumes.
    """
    store = plan.inventory.store
    store.check_owner()
    with store.removal() if plan.needs_quiet else nullcontext():
        freed = _remove_files(plan)
    for foreign in plan.foreign:
        try:
            freed += remove_foreign(foreign)
        except OSError as error:
            raise _failed(foreign.path, error) from error
    return freed + (store.sweep() if plan.dead_temps else 0)


def _remove_files(plan: PrunePlan) -> int:
    """Remove entries and small files while no conversion can begin; returns the bytes freed."""
    store, freed = plan.inventory.store, 0
    if plan.needs_quiet:
        demand_quiet(store)
    aside = [*plan.remains, *_set_aside(plan)]
    claimed = claimed_keys(store)
    if claimed is None and plan.entries:
        raise StoreError(f"{store.root}: a newer version wrote a manifest meanwhile; run again")
    for key, file in plan.entries.items():
        if key not in (claimed or set()):
            demand_quiet(store)
            freed += _unlink(file)
            with contextlib.suppress(StoreError):
                _unlink_path(store.digest_cache.path(file.stamp))
    digests = (*plan.entry_digests, *plan.digests)
    lone = [file for file in digests if not file.path.with_suffix(".safetensors").exists()]
    for file in (*plan.headers, *plan.healed, *lone, *plan.memos, *aside):
        freed += _unlink(file)
    return freed


def _set_aside(plan: PrunePlan) -> list[Found]:
    """Rename the manifests of the models, so that no load uses them; returns the new names.

    A model that was used since the plan was made keeps its manifest, and so its entries.
    """
    aside = []
    for model in plan.models:
        if not all(map(_is_as_found, model.files)):
            continue
        for file in model.files:
            path = file.path.with_name(f"{file.path.name}.removed")
            try:
                os.replace(file.path, path)
                aside.append(replace(file, path=path))
            except FileNotFoundError:  # another removal was faster
                continue
            except OSError as error:
                raise _failed(file.path, error) from error
    for kind in ("manifests", "dropped"):
        with contextlib.suppress(OSError):
            sync_directory(plan.inventory.store.folder(kind))
    return aside


def _is_as_found(file: Found) -> bool:
    """Tell whether a file was not used since it was found; an absent one was not."""
    try:
        return os.stat(file.path, follow_symlinks=False).st_mtime_ns == file.mtime_ns
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _failed(file.path, error) from error


def _unlink(file: Found) -> int:
    """Remove a file if it is the one that was found, and return its bytes."""
    try:
        status = os.stat(file.path, follow_symlinks=False)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _failed(file.path, error) from error
    if (status.st_dev, status.st_ino) != (file.stamp.device, file.stamp.inode):
        return 0
    return file.size if _unlink_path(file.path) else 0


def _unlink_path(path: os.PathLike[str]) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _failed(path, error) from error
    return True


def _failed(path: os.PathLike[str], error: OSError) -> StoreError:
    return StoreError(f"{os.fspath(path)}: cannot be removed: {error.strerror}")
