"""The conversions that a name stands for."""

from __future__ import annotations

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import StoreError
from paroquant_stream.maintenance.inventory import take_inventory
from paroquant_stream.maintenance.places import find_everywhere, find_to_remove, request_of
from paroquant_stream.store.store import cache_store


@pytest.fixture
def both(model_dir):
    """A model that is converted in the cache and inside its directory."""
    for in_place in (False, True):
        convert(make_request(model_dir, in_place=in_place))
    return model_dir


def roots(found) -> list[str]:
    return [place.store.root.name for place, _ in found]


def test_a_model_stands_for_both_but_for_removal_for_the_caches(both):
    inventory = take_inventory(cache_store())
    assert roots(find_everywhere(inventory, str(both))) == ["user-cache", "mlx"]
    assert roots(find_to_remove(inventory, str(both))) == ["user-cache"]
    assert roots(find_to_remove(inventory, f"{both}/mlx")) == ["mlx"]


def test_a_name_of_nothing_is_an_error(both):
    inventory = take_inventory(cache_store())
    with pytest.raises(StoreError, match=r"absent: not converted in .*; `cache ls` lists what is"):
        find_everywhere(inventory, "absent")


def test_its_request_is_of_the_same_manifest(both):
    for place, model in find_everywhere(take_inventory(cache_store()), str(both)):
        request = request_of(place, model)
        assert request.manifest_name == model.id
        assert request.store.root == place.store.root


def test_a_model_named_mlx_is_no_conversion(model_dir):
    model_dir.rename(model_dir.parent / "mlx")
    inventory = take_inventory(cache_store())
    with pytest.raises(StoreError):
        find_everywhere(inventory, str(model_dir.parent / "mlx"))
