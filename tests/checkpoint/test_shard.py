"""Tests of shards: opening, and the SHA-256 that the Hub's cache names."""

from __future__ import annotations

import hashlib
import os

import pytest

from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.checkpoint.model_files import hub_blob
from paroquant_stream.checkpoint.shard import Shard
from paroquant_stream.errors import CheckpointError, MalformedFileError
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint

FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize("kind", ["pipe", "directory", "dangling link", "loop", "outside"])
def test_a_shard_must_be_a_regular_file_of_the_model(model_dir, tmp_path, kind):
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


def test_a_link_inside_the_model_is_followed(model_dir):
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


def test_the_name_of_a_hub_blob_is_its_sha256(tmp_path):
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 64)
    checkpoint = open_checkpoint(ModelConfig.read(snapshot))
    assert checkpoint.headers()
    assert [shard.hub_sha256 for shard in checkpoint.shards] == ["a" * 64, None, None]


def test_a_git_sha1_blob_name_is_not_a_sha256(tmp_path):
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 40)
    assert open_checkpoint(ModelConfig.read(snapshot)).shards[0].hub_sha256 is None


def test_only_one_link_is_followed_to_the_blob(tmp_path):
    """The blob may itself be a link to a Xet hash, which looks like a SHA-256 and is none."""
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 64)
    blob = tmp_path / "models--owner--name" / "blobs" / ("a" * 64)
    xet = tmp_path / "blobs" / "bb" / ("b" * 64)
    xet.parent.mkdir(parents=True)
    blob.rename(xet)
    blob.symlink_to(xet)
    assert hub_blob(snapshot / FIRST).name == "a" * 64
    assert open_checkpoint(ModelConfig.read(snapshot)).shards[0].hub_sha256 == "a" * 64


def test_a_64_digit_name_outside_of_a_hub_cache_is_ignored(model_dir, tmp_path):
    target = model_dir / "blobs" / ("c" * 64)
    target.parent.mkdir()
    (model_dir / FIRST).rename(target)
    (model_dir / FIRST).symlink_to(target)
    assert open_checkpoint(ModelConfig.read(model_dir)).shards[0].hub_sha256 is None


class RecordingCache:
    """A digest cache with one digest that records its calls."""

    def __init__(self):
        self.calls = []

    def lookup(self, fd, name=None):
        self.calls.append((os.fstat(fd).st_ino, name))
        return "known"

    def begin(self, fd):
        return "state"

    def remember(self, fd, before, digest, name=None):
        self.calls.append((before, digest, name))


def test_a_hash_is_stored_with_the_name_of_the_blob(tmp_path):
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 64)
    shard, cache = open_checkpoint(ModelConfig.read(snapshot)).shards[0], RecordingCache()
    digest = hashlib.sha256(shard.path.read_bytes()).hexdigest()
    assert shard.sha256(cache) == digest
    assert cache.calls == [("state", digest, "a" * 64)]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_known_hash_is_looked_up_by_file_and_name(tmp_path, is_open):
    snapshot = hub_snapshot(tmp_path, llama_tensors(), "a" * 64)
    shard, cache = open_checkpoint(ModelConfig.read(snapshot)).shards[0], RecordingCache()
    fd = shard.open() if is_open else None
    assert shard.known_sha256(cache, fd) == "known"
    assert cache.calls == [(shard.path.stat().st_ino, "a" * 64)]
    if fd is not None:
        os.close(fd)  # it was left open


def test_an_absent_shard_is_named(tmp_path):
    shard = Shard("x.safetensors", tmp_path / "x.safetensors")
    for action in (shard.open, shard.header, lambda: shard.known_sha256(RecordingCache())):
        with pytest.raises(CheckpointError, match=r"x\.safetensors: the shard is absent; download"):
            action()
