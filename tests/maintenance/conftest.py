"""Caches with one model, and with three."""

from __future__ import annotations

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.store.store import Store, cache_store
from tests.helpers.conversions import convert_three_models


@pytest.fixture
def store(model_dir) -> Store:
    """A cache with one model of three shards."""
    convert_checkpoint(model_dir)
    return cache_store()


@pytest.fixture
def three_models(tmp_path) -> Store:
    """A cache with models a, b and c of three shards each; b shares every entry with a."""
    return convert_three_models(tmp_path)
