"""The cache: what it holds, and removing from it.

list_cache                 every converted model, and whether a load would convert anything
plan_removal, plan_prune   what would be removed and why; `RemovalPlan.execute()` removes it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from ..maintenance import prune, removal
from ..maintenance.inventory import Inventory, take_inventory
from ..maintenance.models import Model
from ..maintenance.places import (
    Find,
    Found,
    find_all,
    find_everywhere,
    find_to_remove,
)
from ..maintenance.status import ShardState, freshness_of
from ..store.format import Dtype, Variant
from ..store.store import cache_store


@dataclass(frozen=True)
class CachedModel:
    """A converted model in the cache."""

    id: str
    """The name of its manifest; unique in its root."""
    root: Path
    """Where its conversion is: the cache, or `mlx` in its own directory."""
    name: str
    """Its directory, or `owner/name@revision`; with dtype and io_bits if those are not the
    defaults."""
    directory: Path | None
    """Where the model lies or lay; None if that is unknown."""
    dtype: Dtype
    io_bits: int
    layout: str | None
    """How the checkpoint spells its linears; None if the manifest cannot be read."""
    size: int
    """Bytes of its entries, also of those that it shares with other models."""
    last_used: float
    """Seconds since 1970."""
    state: str
    """`fresh`, `stale` (a load converts something), `unknown` (a load reads shards to know),
    `broken` (the directory cannot be used), `orphan` (it is gone) or `damaged` (the manifest)."""
    why: str
    """The reason for the state; empty when fresh."""
    shards: tuple[ShardState, ...]
    only_copy: bool
    """Whether source shards were dropped, so that the cache has the only copy."""


@dataclass(frozen=True)
class CacheListing:
    """What a cache holds."""

    root: Path
    """The directory of the cache."""
    models: tuple[CachedModel, ...]
    size: int
    """Bytes of everything in the cache, also of what belongs to no listed model."""


ModelName = str | Path | CachedModel
"""A model directory (also one that is gone), a Hub id, a listed name, or a listed model."""


@dataclass(frozen=True)
class RemovalPlan:
    """What would be removed from a cache; nothing is, until `execute()`."""

    removals: tuple[removal.Removal, ...]
    kept: tuple[tuple[str, str], ...]
    """What a rule names and stays all the same, and why."""
    size: int
    """Bytes that are freed."""
    details: tuple[prune.PrunePlan, ...] = field(repr=False)
    """A plan for each cache, as the commands print it; its fields may change in any version."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return all(plan.is_empty for plan in self.details)

    def execute(self) -> int:
        """Remove what the plan names, except for what was used since the plan was made.

        Returns:
            The bytes freed.

        Raises:
            StoreError: A conversion is running or begins meanwhile, or a file cannot be removed.
                What was removed before stays removed, and the next removal finishes it.
        """
        return sum(removal.execute(plan) for plan in self.details)


def list_cache(*models: ModelName, cache_dir: str | Path | None = None) -> CacheListing:
    """List the converted models of a cache, and whether a load would convert anything.

    Reads manifests, headers and stat, no weights, and writes nothing. An absent cache is empty.

    Args:
        *models: List these models only, also their conversions beside them; without any, all of
            the cache.
        cache_dir: As in `ConvertOptions`.

    Raises:
        StoreError: A named model is not in the cache.
    """
    inventory = take_inventory(cache_store(cache_dir))
    everything = [(inventory, model) for model in inventory.models]
    chosen = _find(inventory, models) if models else everything
    listed = tuple(_cached(place, model) for place, model in chosen)
    return CacheListing(inventory.store.root, listed, inventory.size)


def plan_removal(*models: ModelName, cache_dir: str | Path | None = None) -> RemovalPlan:
    """Plan the removal of these models from a cache; `execute()` carries it out.

    Entries that another model uses stay. A conversion inside a model directory is meant only where
    the cache has none, or by its own path.

    Args:
        *models: The models; a directory or Hub id names all its conversions.
        cache_dir: As in `ConvertOptions`.

    Raises:
        StoreError: A model is not in the cache, a conversion is running, or a newer version wrote
            into the cache.
    """
    inventory = take_inventory(cache_store(cache_dir))
    places: dict[Path, tuple[Inventory, list[Model]]] = {}
    for place, model in _find(inventory, models, find_to_remove):
        places.setdefault(place.store.root, (place, []))[1].append(model)
    return _plan(*(prune.plan_removal(place, chosen) for place, chosen in places.values()))


def plan_prune(
    *,
    max_size: int | None = None,
    older_than: timedelta | float | None = None,
    orphans: bool = False,
    foreign: bool = False,
    keep: Iterable[ModelName] = (),
    cache_dir: str | Path | None = None,
) -> RemovalPlan:
    """Plan the removal of what is useless, old or too much; `execute()` carries it out.

    Without an option that is what no load can use: temporary files of dead runs, damaged entries
    and manifests, and the like. A model whose source shards were dropped always stays.

    Args:
        max_size: Bytes; remove the least recently used models until the cache fits.
        older_than: Remove models that were not used for so long; a number is in seconds.
        orphans: Remove models whose directory is gone, and entries that no model names and that
            are an hour old.
        foreign: Remove the directories that paroquant's own MLX cache left under the same root.
        keep: Models that stay whatever the other rules say.
        cache_dir: As in `ConvertOptions`.

    Raises:
        StoreError: A model to keep is not in the cache, or a newer version wrote into the cache.
        ValueError: A size or an age is negative.
    """
    age = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
    if (max_size or 0) < 0 or (age or 0) < 0:
        raise ValueError(f"max_size and older_than are 0 or more, not {max_size} and {older_than}")
    inventory = take_inventory(cache_store(cache_dir))
    names = (keep,) if isinstance(keep, str) else tuple(keep)
    kept = frozenset(model.id for _, model in _find(inventory, names))
    return _plan(prune.plan_prune(inventory, prune.Rules(max_size, age, orphans, foreign, kept)))


def _find(
    inventory: Inventory, models: Sequence[ModelName], find: Find = find_everywhere
) -> list[Found]:
    return find_all(inventory, [_name(inventory, model) for model in models], find)


def _name(inventory: Inventory, model: ModelName) -> str:
    if not isinstance(model, CachedModel):
        return str(model)
    if model.root == inventory.store.root:
        return model.id
    return f"{model.root} ({Variant(model.dtype, model.io_bits).name})"


def _cached(inventory: Inventory, model: Model) -> CachedModel:
    freshness = freshness_of(inventory.store, model)
    return CachedModel(
        model.id,
        inventory.store.root,
        model.name,
        model.directory,
        model.variant.dtype,
        model.variant.io_bits,
        model.manifest.layout if model.manifest else None,
        inventory.entry_bytes(model),
        model.last_used,
        freshness.state,
        freshness.why,
        freshness.shards,
        model.only_copy,
    )


def _plan(*plans: prune.PrunePlan) -> RemovalPlan:
    removals = tuple(each for plan in plans for each in removal.removals_of(plan))
    kept = tuple(each for plan in plans for each in plan.kept)
    return RemovalPlan(removals, kept, sum(plan.freed for plan in plans), plans)
