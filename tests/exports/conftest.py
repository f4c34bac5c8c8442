"""Models with a single file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.single_files import export, remove_sources


@pytest.fixture
def exported(model_dir, tmp_path) -> Path:
    """A tiny llama in three shards with its single file."""
    export(model_dir, tmp_path / "cache")
    return model_dir


@pytest.fixture
def alone(exported) -> Path:
    """The same with only its config, its tokenizer and the single file."""
    remove_sources(exported)
    return exported


@pytest.fixture
def no_conversion(monkeypatch):
    monkeypatch.setattr(
        "paroquant_stream.transform.task_runner._convert", lambda *_: pytest.fail("converted again")
    )
