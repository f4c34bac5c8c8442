"""Tests of the model that a user named."""

from __future__ import annotations

import json

import pytest

from paroquant_stream.checkpoint.model_source import ModelSource
from paroquant_stream.errors import CheckpointError


def test_the_config_is_read_once_and_on_first_use(model_dir):
    source = ModelSource("name", model_dir)
    (model_dir / "config.json").write_text(json.dumps({"changed": 1}))
    assert source.config.values == {"changed": 1}
    (model_dir / "config.json").unlink()
    assert source.config.values == {"changed": 1}


def test_a_missing_config_is_an_error_only_when_it_is_used(tmp_path):
    source = ModelSource("name", tmp_path)
    assert source.resolved == tmp_path.resolve()
    with pytest.raises(CheckpointError, match=r"config\.json is absent"):
        _ = source.config


def test_the_resolved_directory_has_no_links(model_dir, tmp_path):
    (tmp_path / "link").symlink_to(model_dir)
    source = ModelSource("name", tmp_path / "link")
    assert source.directory == tmp_path / "link"
    assert source.resolved == model_dir.resolve()


def test_a_shard_lies_in_the_directory_and_may_be_absent(tmp_path):
    shard = ModelSource("name", tmp_path).shard("x.safetensors")
    assert (shard.name, shard.path) == ("x.safetensors", tmp_path / "x.safetensors")
