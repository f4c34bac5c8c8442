"""The model directory: which files are shards, and what is refused before any work."""

from __future__ import annotations

import json
import os

import pytest

from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.checkpoint.model_files import hub_blob
from paroquant_stream.errors import CheckpointError, MalformedFileError
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


def set_weight_map(directory, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_the_index_decides_which_files_are_shards(model_dir):
    (model_dir / "stray.safetensors").write_bytes(b"junk")
    checkpoint = open_checkpoint(ModelConfig.read(model_dir))
    assert [shard.name for shard in checkpoint.shards] == sorted(
        f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)
    )
    assert {t.name for h in checkpoint.headers().values() for t in h.tensors} == set(
        llama_tensors()
    )


def test_without_an_index_only_model_safetensors_is_a_shard(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    (directory / "stray.safetensors").write_bytes(b"junk")
    assert [shard.name for shard in open_checkpoint(ModelConfig.read(directory)).shards] == [
        "model.safetensors"
    ]
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither .*index\.json nor model\.safetensors"):
        open_checkpoint(ModelConfig.read(directory))


def test_a_directory_that_is_not_there_or_has_no_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such model directory"):
        open_checkpoint(ModelConfig.read(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"config\.json is absent"):
        open_checkpoint(ModelConfig.read(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors", "", ".", "..",
     "x\0y.safetensors", "sub/x.safetensors", "x" * 300 + ".safetensors", "x.bin", "-x.safetensors",
     1, None, [], {}],
)  # fmt: skip
def test_a_shard_name_that_is_no_plain_name_is_refused(model_dir, name):
    set_weight_map(model_dir, lambda weights: weights.update({"model.norm.weight": name}))
    with pytest.raises(MalformedFileError, match=r"index\.json"):
        open_checkpoint(ModelConfig.read(model_dir))


@pytest.mark.parametrize(
    "text", [b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"{", b"\xff"]
)
def test_an_index_of_the_wrong_form_is_refused(model_dir, text):
    (model_dir / INDEX).write_bytes(text)
    with pytest.raises(MalformedFileError, match=r"index\.json"):
        open_checkpoint(ModelConfig.read(model_dir))


def test_a_duplicate_key_in_the_config_is_refused(model_dir):
    (model_dir / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(MalformedFileError, match="duplicate key"):
        open_checkpoint(ModelConfig.read(model_dir))


def test_a_tensor_that_the_index_puts_elsewhere_is_named_with_both_shards(model_dir):
    set_weight_map(model_dir, lambda weights: weights.update({"model.norm.weight": FIRST}))
    with pytest.raises(
        CheckpointError,
        match=f"norm.weight: expected in {FIRST} by the index, found in model-00003",
    ):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_tensor_of_the_index_in_no_shard_is_named(model_dir):
    set_weight_map(model_dir, lambda weights: weights.update({"model.extra.weight": FIRST}))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight: .* found in no shard"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_tensor_of_a_shard_that_the_index_does_not_name_is_named(model_dir):
    set_weight_map(model_dir, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm\.weight: .* missing in the index"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_tensor_in_two_shards_is_named_with_both(model_dir):
    (model_dir / "model-00002-of-00003.safetensors").write_bytes((model_dir / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match=r"in two shards, .*00001.* and .*00002"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


@pytest.mark.parametrize("kind", ["pipe", "directory", "dangling link", "loop", "outside"])
def test_a_shard_that_is_no_file_of_the_model_is_refused_without_hanging(model_dir, tmp_path, kind):
    path = model_dir / FIRST
    data = path.read_bytes()
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "dangling link":
            path.symlink_to("absent")
        case "loop":
            path.symlink_to(FIRST)
        case "outside":
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises((CheckpointError, MalformedFileError), match="model-00001"):
        open_checkpoint(ModelConfig.read(model_dir)).headers()


def test_a_link_inside_the_directory_is_followed(model_dir):
    (model_dir / FIRST).rename(model_dir / "blob")
    (model_dir / FIRST).symlink_to("blob")
    assert open_checkpoint(ModelConfig.read(model_dir)).headers()[FIRST].tensors


def hub_snapshot(tmp_path, tensors, blob_name: str):
    """A model in the Hub cache's form: snapshots/<revision>/<name> -> ../../blobs/<etag>."""
    repo = tmp_path / "models--owner--name"
    snapshot = write_checkpoint(repo / "snapshots" / "rev", tensors, cut_evenly(3))
    (repo / "blobs").mkdir()
    (snapshot / FIRST).rename(repo / "blobs" / blob_name)
    (snapshot / FIRST).symlink_to(f"../../blobs/{blob_name}")
    return snapshot


def test_a_hub_blob_is_followed_and_its_name_is_its_sha256(tmp_path):
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 64)
    checkpoint = open_checkpoint(ModelConfig.read(snapshot))
    assert checkpoint.headers()
    assert [shard.hub_sha256 for shard in checkpoint.shards] == ["a" * 64, None, None]


def test_a_git_sha1_blob_name_is_no_sha256(tmp_path):
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 40)
    assert open_checkpoint(ModelConfig.read(snapshot)).shards[0].hub_sha256 is None


def test_only_one_hop_is_taken_to_the_blob(tmp_path):
    """The blob may itself be a link to a Xet hash, which looks like a SHA-256 and is none."""
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 64)
    blob = tmp_path / "models--owner--name" / "blobs" / ("a" * 64)
    xet = tmp_path / "blobs" / "bb" / ("b" * 64)
    xet.parent.mkdir(parents=True)
    blob.rename(xet)
    blob.symlink_to(xet)
    assert hub_blob(snapshot / FIRST).name == "a" * 64
    assert open_checkpoint(ModelConfig.read(snapshot)).shards[0].hub_sha256 == "a" * 64


def test_a_64_digit_name_outside_of_a_hub_cache_is_no_identity(model_dir, tmp_path):
    target = model_dir / "blobs" / ("c" * 64)
    target.parent.mkdir()
    (model_dir / FIRST).rename(target)
    (model_dir / FIRST).symlink_to(target)
    assert open_checkpoint(ModelConfig.read(model_dir)).shards[0].hub_sha256 is None


def test_the_config_digest_covers_config_and_index(model_dir):
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
