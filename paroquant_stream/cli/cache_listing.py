"""How a store's content and a plan of removals are shown: as a table, and as JSON."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..maintenance.inventory import Inventory
from ..maintenance.listing import Row
from ..maintenance.models import Model
from ..maintenance.paroquant_cache import Foreign
from ..maintenance.prune import PrunePlan, Rules, plan_prune
from ..text import age_text, bytes_text, counted, shown, without_start

_STATE = "STATE"
_HEADS = ("MODEL", "LAYOUT", "SHARDS", "SIZE", "LAST USED", _STATE)
_RIGHT = {"SHARDS", "SIZE"}
_LEAST = ("LAYOUT", "SHARDS", "LAST USED")  # what a narrow terminal lacks first
_LEAST_WIDTH = 44  # columns that model and state need
_GAP = "  "


def terminal_width() -> int | None:
    """Return the columns of the terminal that stdout is; None when it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(rows: Sequence[Row], verbose: bool, width: int | None = None) -> list[str]:
    """Return the lines of the table: models, and with `verbose` their shards.

    Args:
        rows: The models.
        verbose: Whether to list each shard.
        width: The most columns of a line; None for no limit.
    """
    cells: list[Sequence[str]] = [_HEADS]
    for row in rows:
        cells.append(_cells(row))
        if verbose:
            cells += [
                (f"  {s.shard}", "", "", bytes_text(s.bytes_out), "", f"{s.state}: {s.why}")
                for s in row.freshness.shards
            ]
    return _aligned(cells, width)


def _cells(row: Row) -> Sequence[str]:
    shards = row.freshness.shards
    return (
        row.model.name,
        row.layout,
        f"{sum(s.is_converted for s in shards)}/{len(shards)}",
        bytes_text(row.size),
        age_text(row.age),
        row.state,
    )


def foreign_table(inventory: Inventory, width: int | None = None) -> list[str]:
    """Return the lines of the directories that paroquant's own cache left."""
    cells: list[Sequence[str]] = [("DIRECTORY", "SIZE", "WRITTEN")]
    for foreign in inventory.foreign:
        age = age_text(inventory.time - foreign.last_used)
        cells.append((str(foreign.path), bytes_text(foreign.size), age))
    return ["", "paroquant's own cache:", *_aligned(cells, width)] if inventory.foreign else []


def _aligned(cells: Sequence[Sequence[str]], limit: int | None) -> list[str]:
    safe = [[shown(cell) for cell in line] for line in cells]
    if limit is not None:
        safe = _fitted(safe, limit)
    widths = _widths(safe)
    return [
        _GAP.join(
            text.rjust(width) if head in _RIGHT else text.ljust(width)
            for text, width, head in zip(line, widths, safe[0], strict=True)
        ).rstrip()
        for line in safe
    ]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(text) for text in column) for column in zip(*lines, strict=True)]


def _fitted(lines: list[list[str]], limit: int) -> list[list[str]]:
    """Leave out what matters least and cut the first column and the state until lines fit."""
    for name in _LEAST:
        if name in lines[0] and _width_of(lines, limit) < _LEAST_WIDTH:
            at = lines[0].index(name)
            lines = [[*line[:at], *line[at + 1 :]] for line in lines]
    left, widths = _width_of(lines, limit), _widths(lines)
    state = min(widths[-1], max(left - widths[0], left // 3)) if lines[0][-1] == _STATE else 0
    first = max(left - state, 8)
    return [
        [without_start(line[0], first), *line[1:-1], _without_end(line[-1], state or widths[-1])]
        for line in lines
    ]


def _width_of(lines: Sequence[Sequence[str]], limit: int) -> int:
    """Return the columns that are left for the first column and the state."""
    widths = _widths(lines)
    kept = widths[1:-1] if lines[0][-1] == _STATE else widths[1:]
    return limit - sum(kept) - len(_GAP) * (len(widths) - 1)


def _without_end(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def footer(inventory: Inventory) -> list[str]:
    """Return the total, and what could be removed."""
    shared = [k for k, ids in inventory.claims.items() if len(ids) > 1 and k in inventory.entries]
    lines = [
        f"{counted(len(inventory.models), 'model')}, {counted(len(inventory.entries), 'entry')}, "
        f"{bytes_text(inventory.size)} in {inventory.store.root}"
    ]
    if shared:
        size = sum(inventory.entries[key].size for key in shared)
        lines.append(f"{counted(len(shared), 'entry')} shared by models ({bytes_text(size)})")
    if unclaimed := inventory.unclaimed:
        lines.append(
            f"{counted(len(unclaimed), 'unclaimed entry')} ({_bytes_of(unclaimed.values())}): of a "
            "conversion that is not complete; run it again, or remove them with `prune --orphans`"
        )
    if idle := [*inventory.dead_temps, *(file for file, _ in inventory.removed)]:
        lines.append(
            f"{counted(len(idle), 'file')} of dead runs and interrupted "
            f"removals ({_bytes_of(idle)}): `prune` removes them"
        )
    if damaged := inventory.damaged.values():
        lines.append(
            f"{counted(len(damaged), 'damaged entry')} ({_bytes_of(damaged)}) kept in "
            f"{inventory.store.folder('damaged')}, as nothing could make them again: put their "
            "shards back and convert"
        )
    if inventory.foreign:
        size = sum(foreign.size for foreign in inventory.foreign)
        lines.append(
            f"{counted(len(inventory.foreign), 'directory')} of paroquant's own cache "
            f"({bytes_text(size)}): `prune --foreign` removes them"
        )
    return ["", *(shown(line) for line in lines)]


def size_lines(sizes: Mapping[str, Any]) -> list[str]:
    """Return the lines of `cache size`, from its JSON."""
    notes = {
        "size": f"total in {sizes['path']}",
        "removable": "of that removable by `cache prune --orphans --foreign`:",
        "useless": "by `cache prune` alone: of dead runs, damaged, digests of absent files",
        "orphans": "with --orphans: of models whose directory is gone, or of none",
        "foreign": "with --foreign: of paroquant's own cache",
        "free": "free on its file system",
    }
    width = max(len(bytes_text(sizes[name])) for name in notes)
    lines = [f"{bytes_text(sizes[name]).rjust(width)}  {note}" for name, note in notes.items()]
    lines += [f"stays: {kept['what']}: {kept['why']}" for kept in sizes["stays"]]
    return [shown(line) for line in lines]


def size_json(inventory: Inventory) -> dict[str, Any]:
    """Return how large a cache is, and how much of that `prune` could remove by which option.

    Args:
        inventory: Of the store.

    Raises:
        StoreError: A manifest is of a newer version, or the free space cannot be determined.
    """
    everything = plan_prune(inventory, Rules(orphans=True, foreign=True))
    useless = plan_prune(inventory, Rules()).freed
    foreign = sum(foreign.size for foreign in inventory.foreign)
    return {
        "path": _text(inventory.store.root),
        "size": inventory.size,
        "removable": everything.freed,
        "useless": useless,
        "orphans": everything.freed - useless - foreign,
        "foreign": foreign,
        "free": inventory.store.free_bytes(),
        "stays": [{"what": what, "why": why} for what, why in everything.kept],
    }


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
