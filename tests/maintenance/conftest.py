"""Caches with one model, and with three."""

from __future__ import annotations

import shutil

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.store.store import Store, cache_store
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint


@pytest.fixture
def store(model_dir) -> Store:
    """A cache with one model of three shards."""
    convert_checkpoint(model_dir)
    return cache_store()


@pytest.fixture
def three_models(tmp_path) -> Store:
    """A cache with models a, b and c of three shards each; b shares every entry with a."""
    write_checkpoint(tmp_path / "a", cut=cut_evenly(3))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_checkpoint(tmp_path / "c", llama_tensors(1), cut_evenly(3))
    for name in ("a", "b", "c"):
        convert_checkpoint(tmp_path / name, jobs=1)
    return cache_store()
