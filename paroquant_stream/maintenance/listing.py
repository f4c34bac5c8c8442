"""The models of a listing: what is found out about each, which are shown, and in what order."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..store.store import Store
from ..text import parse_age, parse_size
from .inventory import Inventory
from .models import Model
from .status import (
    BROKEN,
    DAMAGED,
    FRESH,
    ORPHAN,
    STALE,
    UNKNOWN,
    Freshness,
    freshness_of,
)

STATES = (FRESH, STALE, UNKNOWN, BROKEN, ORPHAN, DAMAGED)


@dataclass(frozen=True)
class Row:
    """A model of a listing."""

    store: Store
    model: Model
    size: int
    """Bytes of its entries, shared ones too."""
    age: float
    """Seconds since it was last used."""

    @cached_property
    def freshness(self) -> Freshness:
        """Whether a load would convert anything; reads the model's directory when first asked."""
        return freshness_of(self.store, self.model)

    @property
    def layout(self) -> str:
        """The layout's name, or `-` when it is not known."""
        return self.model.manifest.layout if self.model.manifest else "-"

    @property
    def state(self) -> str:
        """The state, and why."""
        why = self.freshness.why
        return self.freshness.state + (f": {why}" if why else "")


@dataclass(frozen=True)
class Filter:
    """A condition on a row, such as `size>1GB`."""

    field: str
    """A key of `FIELDS`."""
    holds: Callable[[Any, Any], bool]
    value: Any

    def matches(self, row: Row) -> bool:
        """Tell whether a row fulfils the condition."""
        return self.holds(FIELDS[self.field][0](row), self.value)


@dataclass(frozen=True)
class Order:
    """What a listing is sorted by."""

    key: str
    """A key of `ORDERS`."""
    falling: bool


def _contains(text: str, part: str) -> bool:
    return part in text


def _lacks(text: str, part: str) -> bool:
    return part not in text


def _parse_state(text: str) -> str:
    if text.lower() not in STATES:
        raise ValueError(f"{text!r} is not a state: expected {', '.join(STATES)}")
    return text.lower()


_COMPARE = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt, "=": operator.eq,
}  # fmt: skip
_EQUAL = {"!=": operator.ne, "=": operator.eq}
FIELDS: dict[
    str, tuple[Callable[[Row], Any], Callable[[str], Any], dict[str, Callable[[Any, Any], bool]]]
] = {
    "size": (lambda row: row.size, parse_size, _COMPARE),
    "age": (lambda row: row.age, parse_age, _COMPARE),
    "model": (lambda row: row.model.name.lower(), str.lower, {"!=": _lacks, "=": _contains}),
    "layout": (lambda row: row.layout.lower(), str.lower, _EQUAL),
    "state": (lambda row: row.freshness.state, _parse_state, _EQUAL),
}
"""Field -> its value in a row, how a value is parsed, and what compares the two."""
ORDERS: dict[str, tuple[Callable[[Row], Any], bool]] = {
    "name": (lambda row: row.model.name, False),
    "size": (lambda row: row.size, True),
    "age": (lambda row: row.age, True),
    "layout": (lambda row: row.layout, False),
    "state": (lambda row: row.freshness.state, False),
}
"""Key -> its value in a row, and whether the largest comes first."""
_CONDITION = re.compile(r"\s*([a-z]+)\s*([<>!]?=|[<>])\s*(.*\S)\s*")


def parse_filter(text: str) -> Filter:
    """Return the condition in a text like `size>1GB`, `age>=30d`, `model=llama` or `state=stale`.

    Args:
        text: A field, an operator and a value. `model=` looks for a part of the name; case does
            not matter.

    Raises:
        ValueError: It is anything else.
    """
    match = _CONDITION.fullmatch(text)
    if not match or match[1] not in FIELDS:
        raise ValueError(
            f"{text!r} is not a filter: expected one of {', '.join(FIELDS)}, an operator and a "
            "value, like size>1GB or state=stale"
        )
    field, sign, value = match.groups()
    _, parse, operators = FIELDS[field]
    if sign not in operators:
        raise ValueError(f"{text!r}: {field} is compared with {' or '.join(operators)}")
    return Filter(field, operators[sign], parse(value))


def parse_order(text: str) -> Order:
    """Return the order in a text like `size` or `size:asc`.

    Args:
        text: name, size, age, layout or state; `:asc` puts the smallest first, `:desc` the largest.

    Raises:
        ValueError: It is anything else.
    """
    key, colon, direction = text.partition(":")
    if key not in ORDERS or (colon and direction not in ("asc", "desc")):
        raise ValueError(
            f"{text!r} is not an order: expected one of {', '.join(ORDERS)}, "
            "perhaps with :asc or :desc"
        )
    return Order(key, direction == "desc" if colon else ORDERS[key][1])


def make_row(inventory: Inventory, model: Model) -> Row:
    """Describe a model; its directory is read when its state is asked for."""
    age = inventory.time - model.last_used
    return Row(inventory.store, model, inventory.entry_bytes(model), age)


def select(rows: Iterable[Row], filters: Sequence[Filter], order: Order | None) -> list[Row]:
    """Return the rows that fulfil every condition, in the order asked for.

    Args:
        rows: Sorted by name; so stay those that are equal in the order asked for.
        filters: The conditions. Those on the state, which read directories, are looked at last.
        order: None leaves the rows as they are.
    """
    cheap_first = sorted(filters, key=lambda condition: condition.field == "state")
    found = [row for row in rows if all(condition.matches(row) for condition in cheap_first)]
    if order is None:
        return found
    return sorted(found, key=ORDERS[order.key][0], reverse=order.falling)
