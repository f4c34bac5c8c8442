"""What is to be removed from a store: a plan that can be shown, for `removal` to execute.

An entry that a model shares with one that stays is not in the plan. An entry that no manifest names
may belong to a conversion: it is removed only when none runs, locks work, and it is an hour old.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..errors import StoreError
from ..text import age_text, bytes_text
from .activity import QUIET, demand_quiet, running
from .inventory import Inventory
from .models import Model
from .paroquant_cache import Foreign
from .scan import Found, regular_files


@dataclass(frozen=True)
class Rules:
    """What `prune` removes beside what is surely useless."""

    max_size: int | None = None
    """Bytes; the least recently used models are removed until the rest fits."""
    older_than: float | None = None
    """Seconds; models not used for so long are removed."""
    orphans: bool = False
    """Models whose directory is gone, and entries that no manifest names."""
    foreign: bool = False
    """The directories of paroquant's own cache."""
    keep: frozenset[str] = frozenset()
    """Ids of models that stay whatever the other rules say."""


@dataclass(frozen=True)
class PrunePlan:
    """What is removed, and what was asked for and stays."""

    inventory: Inventory
    models: tuple[Model, ...] = ()
    entries: dict[str, Found] = field(default_factory=dict)
    """By key; of the models, of interrupted removals, and unclaimed ones."""
    unclaimed: frozenset[str] = frozenset()
    """Which of the entries no manifest names."""
    remains: tuple[Found, ...] = ()
    """Manifests of interrupted removals."""
    dead_temps: tuple[Found, ...] = ()
    headers: tuple[Found, ...] = ()
    healed: tuple[Found, ...] = ()
    """Damaged entries that were made again."""
    digests: tuple[Found, ...] = ()
    """Of entries that do not exist."""
    memos: tuple[Found, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    """What stays and why."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each of the models is removed, by its id."""

    @property
    def small(self) -> tuple[Found, ...]:
        """All files that are neither entries nor of a model."""
        listed = (self.remains, self.dead_temps, self.headers, self.healed, self.digests)
        return tuple(file for files in (*listed, self.memos) for file in files)

    @property
    def entry_digests(self) -> tuple[Found, ...]:
        """The digests beside the entries that are removed."""
        known = self.inventory.digests
        return tuple(known[key] for key in self.entries if key in known)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not (self.models or self.entries or self.small or self.foreign)

    @property
    def needs_quiet(self) -> bool:
        """Whether anything is removed that a running conversion may be about to use."""
        small = (*self.headers, *self.healed, *self.digests, *self.memos)
        return bool(self.models or self.entries or small)

    @property
    def freed(self) -> int:
        """Bytes that are freed."""
        files = [*self.entries.values(), *self.entry_digests, *self.small]
        files += [file for model in self.models for file in model.files]
        return sum(f.size for f in files) + sum(foreign.size for foreign in self.foreign)

    def freed_by(self, model: Model) -> int:
        """Return the bytes of the model's entries that are freed; shared ones count nothing."""
        keys = {record.key for record in model.records}
        return sum(file.size for key, file in self.entries.items() if key in keys)


def plan_removal(inventory: Inventory, models: Iterable[Model]) -> PrunePlan:
    """Plan the removal of these models, and the rest of interrupted removals.

    Raises:
        StoreError: A conversion is running, or a manifest is of a newer version.
    """
    demand_quiet(inventory.store)
    going = tuple(models)
    ids = {model.id for model in going}
    claims = inventory.claims
    named = {record.key for model in going for record in model.records}
    named |= {key for _, keys in inventory.removed for key in keys}
    entries = {
        key: inventory.entries[key]
        for key in sorted(named)
        if key in inventory.entries and claims.get(key, set()) <= ids
    }
    lost = {model.id for model in going if model.is_record}  # unreadable, so nobody can use them
    if entries or any(model.newer and model.id not in lost for model in going):
        _demand_readable(inventory, lost)
    return PrunePlan(
        inventory,
        going,
        entries,
        remains=tuple(file for file, _ in inventory.removed),
        headers=_headers(inventory, ids),
        reasons=dict.fromkeys(ids, "asked for"),
    )


def plan_prune(inventory: Inventory, rules: Rules) -> PrunePlan:
    """Plan the removal of what is surely useless and of what the rules name.

    While a conversion runs, only what it cannot use is in the plan.

    Raises:
        StoreError: A manifest is of a newer version.
    """
    foreign = inventory.foreign if rules.foreign else ()
    base = PrunePlan(inventory, dead_temps=inventory.dead_temps, foreign=foreign)
    if reason := running(inventory.store):
        why = f"a conversion is running ({reason})"
        return replace(base, kept=(("models and entries", why),))
    reasons, kept = _choose(inventory, rules)
    if reasons or inventory.removed:
        base = _with_models(base, reasons)
    if rules.max_size is not None:
        base = _shrink(base, rules, kept)
    unclaimed = _idle_entries(base, kept) if rules.orphans else {}

    def idle(files: Iterable[Found]) -> tuple[Found, ...]:
        return tuple(file for file in files if inventory.time - file.changed > QUIET)

    plan = replace(
        base,
        entries=base.entries | unclaimed,
        unclaimed=frozenset(unclaimed),
        headers=base.headers + idle(inventory.headers),
        healed=inventory.healed,
        digests=idle(inventory.lone_digests),
        kept=tuple(kept.items()),
    )
    return replace(plan, memos=_idle_memos(plan))


def _with_models(base: PrunePlan, reasons: dict[str, str]) -> PrunePlan:
    """Add the removal of the models that have a reason to the plan."""
    models = (model for model in base.inventory.models if model.id in reasons)
    removal = plan_removal(base.inventory, models)
    return replace(removal, dead_temps=base.dead_temps, foreign=base.foreign, reasons=reasons)


def _choose(inventory: Inventory, rules: Rules) -> tuple[dict[str, str], dict[str, str]]:
    """Return why models go, by id, and why others stay that a rule names, by name."""
    reasons: dict[str, str] = {}
    kept: dict[str, str] = {}
    for model in inventory.models:
        reason = _reason(model, rules, inventory.time - model.last_used)
        if reason and (model.is_damaged or not _stays(model, rules, kept)):
            reasons[model.id] = reason
    return reasons, kept


def _reason(model: Model, rules: Rules, age: float) -> str | None:
    """Return why a model is removed, whatever the size of the cache; None if it is not."""
    if model.is_damaged:
        return "its manifest is damaged, so no load uses it"
    if rules.orphans and model.is_orphan:
        return f"{model.directory} is gone"
    if rules.older_than is not None and age > rules.older_than:
        return f"last used {age_text(age)}"
    return None


def _stays(model: Model, rules: Rules, kept: dict[str, str]) -> bool:
    """Tell whether a model that a rule names stays all the same, and note why."""
    if model.id in rules.keep:
        kept[model.name] = "--keep"
    elif model.only_copy:
        kept[model.name] = "its source shards were dropped, this is the only copy; `rm` removes it"
    elif model.newer:
        kept[model.name] = "its manifest is of a newer version, or cannot be read"
    else:
        return False
    return True


def _shrink(base: PrunePlan, rules: Rules, kept: dict[str, str]) -> PrunePlan:
    """Add the least recently used models to the plan until the rest fits."""
    inventory, limit = base.inventory, rules.max_size or 0
    for model in sorted(inventory.models, key=lambda model: model.last_used):
        if inventory.size - base.freed <= limit:
            return base
        if model not in base.models and not _stays(model, rules, kept):
            reason = "least recently used, and the cache is larger than allowed"
            base = _with_models(base, base.reasons | {model.id: reason})
    if (over := inventory.size - base.freed - limit) > 0:
        kept["what is left"] = (
            f"{bytes_text(over)} more than --max-size, and no other model may be removed"
        )
    return base


def _idle_entries(base: PrunePlan, kept: dict[str, str]) -> dict[str, Found]:
    """Return the entries that no manifest names and no conversion can be about to name."""
    inventory = base.inventory
    found = {key: f for key, f in inventory.unclaimed.items() if key not in base.entries}
    if not found:
        return {}
    if any(model.newer for model in inventory.models):
        kept[f"{len(found)} unclaimed entries"] = "a manifest of a newer version may name them"
        return {}
    if not inventory.store.locks_work():
        kept[f"{len(found)} unclaimed entries"] = (
            "locks do nothing on this file system, so a running conversion would not be seen"
        )
        return {}
    idle = {key: f for key, f in found.items() if inventory.time - f.changed > QUIET}
    if young := len(found) - len(idle):
        kept[f"{young} unclaimed entries"] = "less than an hour old"
    return idle


def _idle_memos(plan: PrunePlan) -> tuple[Found, ...]:
    """Return the remembered digests of files that are gone.

    Only known when every staying model is readable, and no interrupted conversion could use them.
    """
    inventory = plan.inventory
    staying = [model for model in inventory.models if model not in plan.models]
    blind = any(model.directory is None or model.is_orphan for model in staying)
    if blind or inventory.unclaimed.keys() - plan.entries.keys():
        return ()
    return tuple(file for file in inventory.memos if inventory.time - file.changed > QUIET)


def _headers(inventory: Inventory, ids: set[str]) -> tuple[Found, ...]:
    """Return the kept headers of dropped shards that only these models name."""
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for model in inventory.models:
        named[model.id in ids] |= {r.source_sha256 for r in model.records if r.dropped}
    found = regular_files(inventory.store.folder("headers"))
    return tuple(file for file in found if file.path.name in named[True] - named[False])


def _demand_readable(inventory: Inventory, lost: set[str]) -> None:
    for model in inventory.models:
        if model.newer and model.id not in lost:
            raise StoreError(
                f"{model.files[0].path}: of a newer version of paroquant_stream, or not readable: "
                "the entries that it names are unknown, so none is removed; use that version"
                + (f", or first `cache rm '{model.name}'`" if model.is_record else "")
            )
