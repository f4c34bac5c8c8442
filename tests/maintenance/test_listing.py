"""What a listing shows of the models, and in what order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paroquant_stream.maintenance import listing
from paroquant_stream.maintenance.inventory import take_inventory
from paroquant_stream.maintenance.listing import (
    STATES,
    Row,
    make_row,
    parse_filter,
    parse_order,
    select,
)
from paroquant_stream.store.store import Store
from tests.helpers.builders import settle
from tests.helpers.conversions import convert_three_models

pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Models a, b and c, which no test of this file changes; the directory of c is gone."""
    directory = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAROQUANT_STREAM_CACHE", str(directory / "cache"))
        settle(patch)
        store = convert_three_models(directory)
    shutil.rmtree(directory / "c")
    return store


@pytest.fixture
def rows(store) -> list[Row]:
    """Models a, b and c; c is larger, was used an hour later, and its directory is gone."""
    inventory = take_inventory(store)
    changed = {"c": {"size": 10**9, "age": 3600.0}}
    found = [make_row(inventory, model) for model in inventory.models]
    return [
        Row(row.store, row.model, **{"size": row.size, "age": 7200.0} | changed.get(name, {}))
        for row, name in zip(found, "abc", strict=True)
    ]


def names(rows: list[Row]) -> str:
    return "".join(Path(row.model.name).name for row in rows)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("size>1MB", "c"),
        ("size >= 1 GB", "c"),
        ("size<1GB", "ab"),
        ("size=1GB", "c"),
        ("size!=1GB", "ab"),
        ("age>1h", "ab"),
        ("age<=60m", "c"),
        ("state=orphan", "c"),
        ("state=FRESH", "ab"),
        ("state!=fresh", "c"),
        ("layout=autoawq", "abc"),
        ("layout!=AUTOAWQ", ""),
    ],
)
def test_a_filter_keeps_the_rows_for_which_it_holds(rows, text, left):
    assert names(select(rows, [parse_filter(text)], None)) == left


def test_a_part_of_the_name_finds_a_model_in_any_case(rows):
    part = rows[1].model.name[-4:].upper()
    assert names(select(rows, [parse_filter(f"model={part}")], None)) == "b"
    assert names(select(rows, [parse_filter("model!=/b")], None)) == "ac"


def test_of_several_filters_all_must_hold(rows):
    filters = [parse_filter("size<1GB"), parse_filter("model=/b")]
    assert names(select(rows, filters, None)) == "b"


def test_no_directory_is_read_unless_a_state_is_asked_for(rows, monkeypatch):
    asked = []
    monkeypatch.setattr(listing, "freshness_of", lambda _, model: asked.append(model.name))
    select(rows, [parse_filter("size<1GB"), parse_filter("age>1h")], parse_order("size"))
    assert asked == []
    monkeypatch.undo()
    state = listing.freshness_of
    monkeypatch.setattr(listing, "freshness_of", lambda *a: asked.append(a[1].name) or state(*a))
    select(rows, [parse_filter("state=orphan"), parse_filter("size>=1GB")], None)
    assert [Path(name).name for name in asked] == ["c"]


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("name", "abc"),
        ("name:desc", "cba"),
        ("size", "cab"),
        ("size:asc", "abc"),
        ("age", "abc"),
        ("age:asc", "cab"),
        ("state", "abc"),
        ("layout", "abc"),
    ],
)
def test_rows_are_sorted_and_equal_ones_stay(rows, text, order):
    assert names(select(rows, [], parse_order(text))) == order


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is not a filter: expected one of size, age, model, layout, state"),
        ("size", "is not a filter"),
        ("size>", "is not a filter"),
        ("color=red", "is not a filter"),
        ("size>100", "'100' is not a size"),
        ("age>soon", "'soon' is not an age"),
        ("state=good", f"'good' is not a state: expected {', '.join(STATES)}"),
        ("model>a", "model is compared with != or ="),
    ],
)
def test_what_is_no_filter_says_what_is_expected(text, told):
    with pytest.raises(ValueError, match=r"expected|compared") as error:
        parse_filter(text)
    assert told in str(error.value)


@pytest.mark.parametrize("text", ["", "weight", "size:", "size:up", "size:asc:asc"])
def test_what_is_no_order_says_what_is_expected(text):
    with pytest.raises(ValueError, match="is not an order: expected one of name, size, age"):
        parse_order(text)
