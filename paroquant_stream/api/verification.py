"""Whether the cache holds what was written: `verify_cache` reads every byte of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.config import CONFIG_NAME
from ..conversion.converter import convert
from ..conversion.find_dropped import find_manifest
from ..conversion.request import Request, make_request
from ..errors import ParoquantStreamError, StoreError
from ..maintenance.inventory import take_inventory
from ..maintenance.places import Found, find_all, request_of
from ..maintenance.verify import Problem, verify_found, verify_model, verify_store
from ..store.format import VARIANTS
from ..store.location import IN_PLACE
from ..store.store import cache_store


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
        model: A model directory or a Hub id, all of whose conversions are read; None for
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
        inventory = take_inventory(cache_store(cache_dir))
        found, moved = [(inventory, each) for each in inventory.models], list[Request]()
        results = [verify_store(inventory.store)]
    else:
        found, moved = _to_verify(model, cache_dir, in_place)
        results = [verify_found(place.store, each, sources) for place, each in found]
        results += [verify_model(request, sources) for request in moved]
    problems = tuple(problem for _, several in results for problem in several)
    damaged = {problem.key for problem in problems if problem.key}
    requests = [*moved, *_requests_of(found, damaged)] if damaged else []
    return Verification(sum(n for n, _ in results), problems, tuple(requests))


def _to_verify(
    model: str | Path, cache_dir: str | Path | None, in_place: bool
) -> tuple[list[Found], list[Request]]:
    """Return a model's conversions, or requests for them if only its drop record has them."""
    try:
        found = find_all(take_inventory(cache_store(cache_dir)), [str(model)])
    except StoreError:
        if not os.path.exists(Path(model or "/dev/null").expanduser() / CONFIG_NAME):
            raise
        request = make_request(model, cache_dir=cache_dir, in_place=in_place)
        requests = [request.with_variant(variant) for variant in VARIANTS.values()]
        if moved := [r for r in requests if find_manifest(r)]:
            return [], moved
        raise
    if in_place:
        found = [(place, each) for place, each in found if not place.store.private]
    if not found:
        raise StoreError(f"{model}: no conversion lies in its {IN_PLACE}")
    return found, []


def _requests_of(found: Sequence[Found], damaged: set[str]) -> list[Request]:
    """Return a request for each of these models that has one of these entries."""
    return [
        request_of(place, model)
        for place, model in found
        if model.directory and damaged & {record.key for record in model.records}
    ]
