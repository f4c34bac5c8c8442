"""How a store's content and a plan of removals are shown: as a table, and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.model_source import ModelSource
from ..conversion.request import Request, Target
from ..maintenance.inventory import Inventory
from ..maintenance.models import Model
from ..maintenance.paroquant_cache import Foreign
from ..maintenance.prune import PrunePlan
from ..maintenance.status import STALE, UNKNOWN, Freshness, entries_alone, examine
from ..store.store import Store
from ..text import age_text, bytes_text, shown

_HEADS = ("MODEL", "LAYOUT", "SHARDS", "SIZE", "LAST USED", "STATE")
_RIGHT = {"SHARDS", "SIZE"}


@dataclass(frozen=True)
class Row:
    """A model with what was found out about it."""

    model: Model
    freshness: Freshness
    size: int
    """Bytes of its entries, shared ones too."""

    @property
    def state(self) -> str:
        """The state, and why."""
        why = self.freshness.why
        return self.freshness.state + (f": {why}" if why else "")


def make_row(inventory: Inventory, model: Model) -> Row:
    """Describe a model; reads its directory."""
    return Row(model, _freshness(inventory.store, model), inventory.entry_bytes(model))


def _freshness(store: Store, model: Model) -> Freshness:
    manifest, directory = model.manifest, model.directory
    if model.moved and manifest:
        why = "its directory was moved or holds another model, and the model loads where it is now"
        return Freshness("orphan", why, entries_alone(store, manifest, why))
    if model.is_record and manifest:
        why = "a conversion with --drop-source was interrupted; run it again"
        return Freshness(STALE, why, entries_alone(store, manifest, why))
    if manifest is None:
        if model.newer:
            return Freshness(UNKNOWN, "of a newer version, or not readable", ())
        if model.records:
            return Freshness(
                STALE, "a conversion with --drop-source was interrupted; run it again", ()
            )
        return Freshness("damaged", "the next conversion replaces it", ())
    if directory is None:
        why = "made by an older version, which did not record where the model lies"
        return Freshness(UNKNOWN, why, entries_alone(store, manifest, why))
    if model.is_orphan:
        why = f"{directory} is gone"
        return Freshness("orphan", why, entries_alone(store, manifest, why))
    target = Target(store, variant=model.variant)
    return examine(Request(ModelSource(str(directory), directory), target), manifest)


def table(inventory: Inventory, rows: Sequence[Row], verbose: bool) -> list[str]:
    """Return the lines of the table: models, and with `verbose` their shards."""
    cells: list[Sequence[str]] = [_HEADS]
    for row in rows:
        cells.append(_cells(inventory, row))
        if verbose:
            cells += [
                (f"  {s.shard}", "", "", bytes_text(s.bytes_out), "", f"{s.state}: {s.why}")
                for s in row.freshness.shards
            ]
    return _aligned(cells)


def _cells(inventory: Inventory, row: Row) -> Sequence[str]:
    shards = row.freshness.shards
    return (
        row.model.name,
        row.model.manifest.layout if row.model.manifest else "-",
        f"{sum(s.is_converted for s in shards)}/{len(shards)}",
        bytes_text(row.size),
        age_text(inventory.time - row.model.last_used),
        row.state,
    )


def foreign_table(inventory: Inventory) -> list[str]:
    """Return the lines of the directories that paroquant's own cache left."""
    cells: list[Sequence[str]] = [("DIRECTORY", "SIZE", "WRITTEN")]
    for foreign in inventory.foreign:
        age = age_text(inventory.time - foreign.last_used)
        cells.append((str(foreign.path), bytes_text(foreign.size), age))
    return ["", "paroquant's own cache:", *_aligned(cells)] if inventory.foreign else []


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    safe = [[shown(cell) for cell in line] for line in cells]
    widths = [max(len(line[index]) for line in safe) for index in range(len(safe[0]))]
    return [
        "  ".join(
            text.rjust(width) if head in _RIGHT else text.ljust(width)
            for text, width, head in zip(line, widths, safe[0], strict=True)
        ).rstrip()
        for line in safe
    ]


def footer(inventory: Inventory) -> list[str]:
    """Return the total, and what could be removed."""
    shared = [k for k, ids in inventory.claims.items() if len(ids) > 1 and k in inventory.entries]
    lines = [
        f"{_count(len(inventory.models), 'model')}, {_count(len(inventory.entries), 'entry')}, "
        f"{bytes_text(inventory.size)} in {inventory.store.root}"
    ]
    if shared:
        size = sum(inventory.entries[key].size for key in shared)
        lines.append(f"{_count(len(shared), 'entry')} shared by models ({bytes_text(size)})")
    if unclaimed := inventory.unclaimed:
        lines.append(
            f"{_count(len(unclaimed), 'unclaimed entry')} ({_bytes_of(unclaimed.values())}): of a "
            "conversion that is not complete; run it again, or remove them with `prune --orphans`"
        )
    if idle := [*inventory.dead_temps, *(file for file, _ in inventory.removed)]:
        lines.append(
            f"{_count(len(idle), 'file')} of dead runs and interrupted "
            f"removals ({_bytes_of(idle)}): `prune` removes them"
        )
    if damaged := inventory.damaged.values():
        lines.append(
            f"{_count(len(damaged), 'damaged entry')} ({_bytes_of(damaged)}) kept in "
            f"{inventory.store.folder('damaged')}, as nothing could make them again: put their "
            "shards back and convert"
        )
    if inventory.foreign:
        size = sum(foreign.size for foreign in inventory.foreign)
        lines.append(
            f"{_count(len(inventory.foreign), 'directory')} of paroquant's own cache "
            f"({bytes_text(size)}): `prune --foreign` removes them"
        )
    return ["", *(shown(line) for line in lines)]


def plan_lines(plan: PrunePlan) -> list[str]:
    """Return what is removed, how much that frees, and what stays."""
    lines = [f"  {_removal_of(plan, model)}" for model in plan.models]
    lines += [f"  {f.path}  {bytes_text(f.size)}  paroquant's own cache" for f in plan.foreign]
    unclaimed = [plan.entries[key] for key in plan.unclaimed]
    groups = {
        "entry that no model names": unclaimed,
        "temp of dead runs or damaged entry": plan.dead_temps,
        "rest of a removal that was cut off": plan.remains,
        "kept header of a dropped shard": plan.headers,
        "damaged entry that was made again": plan.healed,
        "digest of an entry that is gone": plan.digests,
        "remembered digest of a file that is gone": plan.memos,
    }
    lines += [f"  {len(f)} x {what}  {_bytes_of(f)}" for what, f in groups.items() if f]
    lines += [f"stays: {what}: {why}" for what, why in plan.kept]
    return [shown(line) for line in lines]


def _removal_of(plan: PrunePlan, model: Model) -> str:
    freed, size = plan.freed_by(model), plan.inventory.entry_bytes(model)
    line = f"{model.name}  {bytes_text(freed)}"
    if freed < size:
        line += f", {bytes_text(size - freed)} shared with others stay"
    if model.only_copy:
        line += "; its source shards were dropped: THIS IS THE ONLY COPY"
    return line


def _bytes_of(files: Iterable[Any]) -> str:
    return bytes_text(sum(file.size for file in files))


def _count(count: int, noun: str) -> str:
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else many}"


def as_json(inventory: Inventory, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the models, the directories of paroquant's own cache, and what no model uses."""
    listed = [_model_json(row) for row in rows]
    listed += [_foreign_json(foreign) for foreign in inventory.foreign]
    idle = {"unclaimed": [*inventory.unclaimed.values()], "temps": [*inventory.dead_temps]}
    for kind, files in idle.items():
        paths = [_text(file.path) for file in files]
        size = sum(file.size for file in files)
        listed += [{"kind": kind, "size": size, "files": paths}] if files else []
    return listed


def _model_json(row: Row) -> dict[str, Any]:
    model, manifest = row.model, row.model.manifest
    return {
        "kind": "model",
        "name": _text(model.name),
        "directory": _text(model.directory) if model.directory else None,
        "manifest": _text(model.files[0].path),
        "layout": manifest.layout if manifest else None,
        "size": row.size,
        "last_used": model.last_used,
        "state": row.freshness.state,
        "why": row.freshness.why,
        "shards_converted": sum(shard.is_converted for shard in row.freshness.shards),
        "shards": [asdict(shard) for shard in row.freshness.shards],
    }


def _foreign_json(foreign: Foreign) -> dict[str, Any]:
    path, used = _text(foreign.path), foreign.last_used
    return {"kind": "paroquant", "path": path, "size": foreign.size, "last_used": used}


def plan_json(plan: PrunePlan, dry_run: bool) -> dict[str, Any]:
    """Return what is removed, or was."""
    files = [*plan.entries.values(), *plan.small]
    return {
        "dry_run": dry_run,
        "models": [_text(model.name) for model in plan.models],
        "files": [_text(file.path) for file in files],
        "foreign": [_text(foreign.path) for foreign in plan.foreign],
        "stays": [{"what": what, "why": why} for what, why in plan.kept],
        "size": plan.freed,
    }


def _text(path: object) -> str:
    """Return a path as JSON can hold it; bytes that are no UTF-8 as `?`."""
    return os.fsencode(str(path)).decode("utf-8", "replace")
