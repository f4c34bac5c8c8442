"""Tests of checkpoints: the list of shards, and headers that agree with the index."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.errors import CheckpointError, MalformedFileError
from tests.helpers.builders import llama_tensors, write_checkpoint

INDEX = "model.safetensors.index.json"


FIRST = "model-00001-of-00003.safetensors"


def set_weight_map(directory, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_the_index_lists_the_shards(model_dir):
    (model_dir / "stray.safetensors").write_bytes(b"junk")
    checkpoint = open_checkpoint(ModelConfig.read(model_dir))
    assert [shard.name for shard in checkpoint.shards] == sorted(
        f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)
    )
    assert {t.name for h in checkpoint.headers().values() for t in h.tensors} == set(
        llama_tensors()
    )


def test_without_an_index_there_is_one_shard(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    (directory / "stray.safetensors").write_bytes(b"junk")
    assert [shard.name for shard in open_checkpoint(ModelConfig.read(directory)).shards] == [
        "model.safetensors"
    ]
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither .*index\.json nor model\.safetensors"):
        open_checkpoint(ModelConfig.read(directory))


def test_a_tensor_in_another_shard_is_an_error(model_dir):
    set_weight_map(model_dir, lambda weights: weights.update({"model.norm.weight": FIRST}))
    with pytest.raises(
        CheckpointError,
        match=f"norm.weight: expected in {FIRST} by the index, found in model-00003",
    ):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_tensor_in_no_shard_is_an_error(model_dir):
    set_weight_map(model_dir, lambda weights: weights.update({"model.extra.weight": FIRST}))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight: .* found in no shard"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_tensor_missing_in_the_index_is_an_error(model_dir):
    set_weight_map(model_dir, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm\.weight: .* missing in the index"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_tensor_in_two_shards_is_an_error(model_dir):
    (model_dir / "model-00002-of-00003.safetensors").write_bytes((model_dir / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match=r"in two shards, .*00001.* and .*00002"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_shard_may_be_absent_if_its_header_is_known(model_dir):
    whole = open_checkpoint(ModelConfig.read(model_dir)).headers()
    (model_dir / FIRST).unlink()
    config = ModelConfig.read(model_dir)
    with pytest.raises(CheckpointError, match=f"the index names absent shards: {FIRST}; download"):
        open_checkpoint(config)
    checkpoint = open_checkpoint(config, lambda name: name == FIRST)
    with pytest.raises(CheckpointError, match=f"{FIRST}: the shard is absent"):
        checkpoint.headers()
    assert replace(checkpoint, known_headers={FIRST: whole[FIRST]}).headers() == whole


def test_a_known_header_must_agree_with_the_index_too(model_dir):
    checkpoint = open_checkpoint(ModelConfig.read(model_dir))
    headers = checkpoint.headers()
    wrong = {FIRST: headers["model-00002-of-00003.safetensors"]}
    with pytest.raises(CheckpointError, match="index and shards disagree"):
        replace(checkpoint, known_headers=wrong).headers()


def test_every_disagreement_is_listed(model_dir):
    set_weight_map(
        model_dir, lambda weights: weights.update({"model.one": FIRST, "model.two": FIRST})
    )
    with pytest.raises(CheckpointError, match=r"model\.one: .*\n  model\.two: "):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_malformed_config_is_reported_before_an_absent_shard(model_dir):
    (model_dir / "config.json").write_text("[]")
    (model_dir / FIRST).unlink()
    with pytest.raises(MalformedFileError, match=r"config\.json: expected a JSON object"):
        open_checkpoint(ModelConfig.read(model_dir))
