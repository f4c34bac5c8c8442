"""A cache with one model."""

from __future__ import annotations

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.store.store import Store, cache_store


@pytest.fixture
def store(model_dir) -> Store:
    """A cache with one model of three shards."""
    convert_checkpoint(model_dir)
    return cache_store()
