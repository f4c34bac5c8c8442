"""Parameters of models, compared bit for bit, and the catalog of fixtures."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from paroquant_stream.backends.backend import Backend
from tests.helpers.paths import FIXTURES

CATALOG = json.loads((FIXTURES / "catalog.json").read_text())


EXPECTED = FIXTURES / "expected"


VISION = [row for row in CATALOG if row["vision"]]


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def bits(array: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes; a bit comparison tells -0.0 from 0.0."""
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return str(array.dtype), array.shape, bytes(memoryview(raw))


def assert_same(found: dict[str, mx.array], correct: dict[str, mx.array]) -> None:
    assert found.keys() == correct.keys()
    unequal = [name for name in correct if bits(found[name]) != bits(correct[name])]
    assert unequal == []


def name_of(row: dict) -> str:
    return row["name"]


def where_loadable(rows: list[dict], library: Backend) -> list:
    """The rows as parameters; those whose class the installed library lacks are skipped."""
    found = []
    for row in rows:
        config = json.loads((FIXTURES / row["name"] / "config.json").read_text())
        reason = library.why_unknown(config)
        skip = pytest.mark.skipif(reason is not None, reason=reason or "")
        found.append(pytest.param(row, marks=skip, id=name_of(row)))
    return found
