"""Fixtures for the tests of models from a Hub on loopback."""

from __future__ import annotations

import pytest

from paroquant_stream import convert_checkpoint
from tests.helpers.builders import cut_evenly, write_checkpoint
from tests.helpers.hub_models import COUNT, REPO, digests


@pytest.fixture
def source(tmp_path):
    """Write the model that is pushed to the Hub."""
    return write_checkpoint(tmp_path / "source", cut=cut_evenly(COUNT))


@pytest.fixture
def right(source, tmp_path) -> list[str]:
    """The digests of the entries of the same files, converted from a directory."""
    return digests(convert_checkpoint(source, cache_dir=tmp_path / "right"))


@pytest.fixture
def commit(hub, source) -> str:
    """Push the model."""
    return hub.push(REPO, source)


@pytest.fixture
def impatient(monkeypatch):
    """Let the Hub's client retry at once; it waits a second."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
