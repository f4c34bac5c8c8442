"""Tests of config.json and the index: their form, size and digest."""

from __future__ import annotations

import hashlib
import json

import pytest

from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.errors import CheckpointError, MalformedFileError

INDEX = "model.safetensors.index.json"


def set_weight_map(directory, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_an_absent_directory_or_config_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such model directory"):
        open_checkpoint(ModelConfig.read(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"config\.json is absent"):
        open_checkpoint(ModelConfig.read(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors", "", ".", "..",
     "x\0y.safetensors", "sub/x.safetensors", "x" * 300 + ".safetensors", "x.bin", "-x.safetensors",
     "x.safetensors.bin", "x.safetensors/y", "x.safetensors\n", 1, None, [], {}],
)  # fmt: skip
def test_a_shard_name_must_be_a_plain_file_name(model_dir, name):
    set_weight_map(model_dir, lambda weights: weights.update({"model.norm.weight": name}))
    with pytest.raises(MalformedFileError, match=r"index\.json"):
        open_checkpoint(ModelConfig.read(model_dir))


@pytest.mark.parametrize(
    "text", [b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"{", b"\xff"]
)
def test_a_malformed_index_is_refused(model_dir, text):
    (model_dir / INDEX).write_bytes(text)
    with pytest.raises(MalformedFileError, match=r"index\.json"):
        open_checkpoint(ModelConfig.read(model_dir))


def test_a_duplicate_key_in_the_config_is_refused(model_dir):
    (model_dir / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(MalformedFileError, match="duplicate key"):
        open_checkpoint(ModelConfig.read(model_dir))


def test_the_digest_covers_config_and_index(model_dir):
    first = ModelConfig.read(model_dir).sha256
    assert open_checkpoint(ModelConfig.read(model_dir)).config.sha256 == first
    (model_dir / INDEX).write_text((model_dir / INDEX).read_text() + " ")
    second = ModelConfig.read(model_dir).sha256
    (model_dir / "config.json").write_text((model_dir / "config.json").read_text() + " ")
    assert len({first, second, ModelConfig.read(model_dir).sha256}) == 3


@pytest.mark.parametrize(("name", "bound"), [(INDEX, "MAX_JSON"), ("config.json", "MAX_CONFIG")])
def test_an_oversized_index_or_config_is_refused(model_dir, monkeypatch, name, bound):
    monkeypatch.setattr(f"paroquant_stream.checkpoint.config.{bound}", 100)
    with pytest.raises(CheckpointError, match=f"{name}: .*, which no model needs"):
        open_checkpoint(ModelConfig.read(model_dir))


def test_the_digest_tells_an_empty_index_from_none(tmp_path):
    """Manifests contain it, so it must not change."""
    assert ModelConfig(tmp_path, b"{}", None).sha256 == hashlib.sha256(b"{}\0").hexdigest()
    assert ModelConfig(tmp_path, b"{}", b"").sha256 == hashlib.sha256(b"{}\1").hexdigest()
    assert ModelConfig(tmp_path, b"{}", b"[]").sha256 == hashlib.sha256(b"{}\1[]").hexdigest()


def test_shard_names_are_sorted_and_listed_once(tmp_path):
    weights = {"b": "y.safetensors", "a": "y.safetensors", "c": "x.safetensors"}
    index = json.dumps({"weight_map": weights}).encode()
    config = ModelConfig(tmp_path, b"{}", index)
    assert config.shard_names == ("x.safetensors", "y.safetensors")
    assert config.weight_map == weights
    assert ModelConfig(tmp_path, b"{}", None).shard_names == ("model.safetensors",)


def test_only_an_export_has_its_mark(tmp_path):
    assert ModelConfig(tmp_path, b'{"paroquant_stream": {}}', None).is_export
    assert not ModelConfig(tmp_path, b'{"paroquant_config": {}}', None).is_export
