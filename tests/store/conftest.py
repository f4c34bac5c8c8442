"""Fixtures for the tests of the store."""

from __future__ import annotations

import pytest

from paroquant_stream.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    """Create an empty cache."""
    store = Store(tmp_path / "cache")
    store.create()
    return store
