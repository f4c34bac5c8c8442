"""The cache: what it holds, whether that is what was written, and removing from it.

list_cache                 every converted model, and whether a load would convert anything
verify_cache               reads every byte; `Verification.repair()` converts again
plan_removal, plan_prune   what would be removed and why; `RemovalPlan.execute()` removes it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from ..checkpoint.model_source import ModelSource
from ..conversion.converter import convert
from ..conversion.find_dropped import find_manifest
from ..conversion.request import Request, Target, default_jobs, make_request
from ..errors import ParoquantStreamError
from ..maintenance import prune, removal
from ..maintenance.inventory import Inventory, find_models, take_inventory
from ..maintenance.models import Model
from ..maintenance.status import ShardState, freshness_of
from ..maintenance.verify import Problem, verify_model, verify_store
from ..store.format import DTYPES, Dtype
from ..store.store import cache_store


@dataclass(frozen=True)
class CachedModel:
    """A converted model in the cache."""

    id: str
    """The name of its manifest; unique in the cache."""
    name: str
    """Its directory, or `owner/name@revision`; with the dtype if that is not "source"."""
    directory: Path | None
    """Where the model lies or lay; None if that is unknown."""
    dtype: Dtype
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
    details: prune.PrunePlan = field(repr=False)
    """The plan as the commands print it; its fields may change in any version."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return self.details.is_empty

    def execute(self) -> int:
        """Remove what the plan names, except for what was used since the plan was made.

        Returns:
            The bytes freed.

        Raises:
            StoreError: A conversion is running or begins meanwhile, or a file cannot be removed.
                What was removed before stays removed, and the next removal finishes it.
        """
        return removal.execute(self.details)


@dataclass(frozen=True)
class Verification:
    """What was read, and what is not as it was written."""

    files: int
    """How many were read."""
    problems: tuple[Problem, ...]
    requests: tuple[Request, ...] = field(repr=False)
    """The conversions that `repair` runs; their fields may change in any version."""

    @property
    def damaged(self) -> tuple[Problem, ...]:
        """The problems that `repair` mends: those of entries, not of source shards."""
        return tuple(problem for problem in self.problems if problem.key)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that `repair` converts again: those that use a damaged entry."""
        return tuple(dict.fromkeys(request.source.name for request in self.requests))

    def repair(self, done: Callable[[str], object] | None = None) -> None:
        """Convert the models of damaged entries again, the damaged shards alone.

        Args:
            done: Called with each model's name once it is converted.

        Raises:
            SomeModelsFailedError: Some models were not converted; its `failures` has the errors.
        """
        failed: dict[str, ParoquantStreamError] = {}
        for request in self.requests:
            try:
                convert(request)
            except ParoquantStreamError as error:
                failed[request.source.name] = error
            else:
                if done:
                    done(request.source.name)
        if failed:
            from ..conversion.batch import some_failed  # brings threads

            raise some_failed(failed, len(self.models))


def list_cache(*models: ModelName, cache_dir: str | Path | None = None) -> CacheListing:
    """List the converted models of a cache, and whether a load would convert anything.

    Reads manifests, headers and stat, no weights, and writes nothing. An absent cache is empty.

    Args:
        *models: List these models only; without any, all.
        cache_dir: As in `ConvertOptions`.

    Raises:
        StoreError: A named model is not in the cache.
    """
    inventory = take_inventory(cache_store(cache_dir))
    chosen = _find(inventory, models) if models else inventory.models
    listed = tuple(_cached(inventory, model) for model in chosen)
    return CacheListing(inventory.store.root, listed, inventory.size)


def verify_cache(
    model: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    in_place: bool = False,
    sources: bool = False,
) -> Verification:
    """Read every entry, and compare its hash with that taken when it was written.

    A damaged entry is taken out of use at once, so that the next load converts its shard again.

    Args:
        model: A model directory or a Hub id, whose conversions to every dtype are read; None for
            all models of the cache.
        cache_dir: As in `ConvertOptions`.
        in_place: Read the conversion in `<model>/mlx`.
        sources: Read the model's shards too.

    Raises:
        StoreError: The model is not in the cache, or the cache cannot be read.
        CheckpointError: There is no such model.
        ValueError: `in_place` or `sources` without a model.
    """
    if model is None:
        if in_place or sources:
            raise ValueError("in_place and sources need a model")
        files, problems = verify_store(cache_store(cache_dir))
        damaged = {problem.key for problem in problems if problem.key}
        return Verification(files, tuple(problems), _requests_of(cache_dir, damaged))
    request = make_request(model, cache_dir=cache_dir, in_place=in_place)  # once: it asks the Hub
    requests = [replace(request, target=replace(request.target, dtype=d)) for d in DTYPES]
    requests = [r for r in requests if find_manifest(r)] or requests[:1]
    found = [verify_model(request, sources) for request in requests]
    problems = [problem for _, several in found for problem in several]
    damaged = {problem.key for problem in problems if problem.key}
    return Verification(
        sum(n for n, _ in found), tuple(problems), tuple(requests) if damaged else ()
    )


def plan_removal(*models: ModelName, cache_dir: str | Path | None = None) -> RemovalPlan:
    """Plan the removal of these models from a cache; `execute()` carries it out.

    Entries that another model uses stay, and so does everything in the model directories.

    Args:
        *models: The models; a directory or Hub id names its conversions to every dtype.
        cache_dir: As in `ConvertOptions`.

    Raises:
        StoreError: A model is not in the cache, a conversion is running, or a newer version wrote
            into the cache.
    """
    inventory = take_inventory(cache_store(cache_dir))
    return _plan(prune.plan_removal(inventory, _find(inventory, models)))


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
    kept = frozenset(model.id for model in _find(inventory, names))
    return _plan(prune.plan_prune(inventory, prune.Rules(max_size, age, orphans, foreign, kept)))


def _find(inventory: Inventory, models: Sequence[ModelName]) -> list[Model]:
    names = [model.id if isinstance(model, CachedModel) else str(model) for model in models]
    return find_models(inventory, names)


def _cached(inventory: Inventory, model: Model) -> CachedModel:
    freshness = freshness_of(inventory.store, model)
    return CachedModel(
        model.id,
        model.name,
        model.directory,
        model.dtype,
        model.manifest.layout if model.manifest else None,
        inventory.entry_bytes(model),
        model.last_used,
        freshness.state,
        freshness.why,
        freshness.shards,
        model.only_copy,
    )


def _requests_of(cache_dir: str | Path | None, damaged: set[str]) -> tuple[Request, ...]:
    """Return a request for each model of the cache that has one of these entries."""
    store = cache_store(cache_dir)
    return tuple(
        Request(
            ModelSource(str(m.directory), m.directory),
            Target(store, dtype=m.dtype),
            jobs=default_jobs(),
        )
        for m in (take_inventory(store).models if damaged else ())
        if m.directory and damaged & {record.key for record in m.records}
    )


def _plan(plan: prune.PrunePlan) -> RemovalPlan:
    return RemovalPlan(tuple(removal.removals_of(plan)), plan.kept, plan.freed, plan)
