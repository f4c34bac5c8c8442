"""The conversions that a name stands for: in a cache, and inside a model directory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint.config import CONFIG_NAME
from ..checkpoint.model_source import ModelSource
from ..conversion.request import Request, Target, default_jobs, model_id
from ..errors import StoreError
from ..store.format import VARIANTS
from ..store.location import IN_PLACE
from ..store.store import Store
from .inventory import Inventory, take_inventory
from .models import Model

_VARIANT = re.compile(rf"(.+) \(({'|'.join(VARIANTS)})\)")
Found = tuple[Inventory, Model]
Find = Callable[[Inventory, str], list[Found]]


def find_everywhere(inventory: Inventory, name: str) -> list[Found]:
    """Return the conversions of a model, that inside its directory too.

    Args:
        inventory: Of the cache.
        name: A model directory, its `mlx`, a Hub id, an id, or a name as a listing shows it.

    Raises:
        StoreError: There is none.
    """
    _check_name(name)
    found = [*_in_cache(inventory, name), *_inside(name)]
    if not found:
        raise StoreError(
            f"{name}: not converted in {inventory.store.root}; `cache ls` lists what is"
        )
    return found


def find_to_remove(inventory: Inventory, name: str) -> list[Found]:
    """Return the conversions that a removal of this name means.

    One inside a model directory, which a model may have been published with, is meant only where
    the cache has none, or by its own path.

    Raises:
        StoreError: There is none.
    """
    _check_name(name)  # a path without a name is the current directory
    return _in_cache(inventory, name) or find_everywhere(inventory, name)


def find_all(
    inventory: Inventory, names: Iterable[str], find: Find = find_everywhere
) -> list[Found]:
    """Return the conversions of several names, each once.

    Args:
        inventory: Of the cache.
        names: As for `find`.
        find: `find_everywhere` or `find_to_remove`.

    Raises:
        StoreError: There is none of some name.
    """
    found = [pair for name in names for pair in find(inventory, name)]
    return list({(place.store.root, model.id): (place, model) for place, model in found}.values())


def request_of(inventory: Inventory, model: Model) -> Request:
    """Return the request by which a model with a known directory is converted again."""
    if model.directory is None:
        raise StoreError(f"{model.name}: where it lies is not known; convert it by its path")
    target = Target(inventory.store, in_place=not inventory.store.private, variant=model.variant)
    return Request(ModelSource(str(model.directory), model.directory), target, jobs=default_jobs())


def _check_name(name: str) -> None:
    if not name.strip():
        raise StoreError("the name of the model is empty; `cache ls` lists the names")


def _in_cache(inventory: Inventory, name: str) -> list[Found]:
    path = Path(os.path.realpath(os.path.expanduser(name)))
    ids = {name, *(model_id(path, variant) for variant in VARIANTS.values())}
    same = [model for model in inventory.models if model.id in ids]
    return [(inventory, m) for m in same or _named(inventory.models, name)]


def _named(models: Iterable[Model], name: str) -> list[Model]:
    return [model for model in models if name in model.names]


def _inside(name: str) -> list[Found]:
    """Return the conversions inside the model directory of this name, or of this path of one."""
    match = _VARIANT.fullmatch(name)
    path = Path(os.path.realpath(os.path.expanduser(match[1] if match else name)))
    is_own = path.name == IN_PLACE and os.path.exists(path.parent / CONFIG_NAME)
    if match and not is_own:
        return []
    root = path if is_own else path / IN_PLACE
    if not os.path.isdir(root):
        return []
    inventory = take_inventory(Store(root, private=False))
    chosen = [m for m in inventory.models if not match or m.variant.name == match[2]]
    return [(inventory, model) for model in chosen]
