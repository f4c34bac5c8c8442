"""Whether a single file may be used for the model as it is now."""

from __future__ import annotations

import logging
import os

import mlx.core as mx
import pytest

from paroquant_stream import load
from paroquant_stream.checkpoint.quantization import Quantization
from paroquant_stream.errors import CheckpointError, StoreError
from paroquant_stream.exports import single_file, single_file_reader
from paroquant_stream.exports.single_file import NAME
from paroquant_stream.files.tensor_header import read_header
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import (
    cut_evenly,
    flip,
    remember,
    uncovered,
    write_checkpoint,
)
from tests.helpers.parameters import assert_same, parameters
from tests.helpers.single_files import export, remove_sources, shards

pytestmark = pytest.mark.usefixtures("on_the_cpu", "settled")


def test_one_changed_source_makes_it_stale(exported, caplog):
    shard = exported / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found, _, _ = load(exported)
    assert f"{NAME}: {shard.name} changed" in caplog.text
    (exported / NAME).unlink()
    assert_same(parameters(found), parameters(load(exported)[0]))


def test_a_source_that_was_not_there_makes_it_stale(tmp_path, caplog):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(2))
    export(directory, tmp_path / "cache")
    remove_sources(directory)
    write_checkpoint(directory, cut=cut_evenly(3))
    load(directory)
    assert "model-00001-of-00003.safetensors was not there when it was made" in caplog.text


def test_a_changed_source_without_an_index_makes_it_stale(exported, caplog):
    (exported / "model.safetensors.index.json").unlink()
    first, *others = sorted(shards(exported))
    first.write_bytes(first.read_bytes() + b"x")
    for path in others:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} changed"):
        load(exported)


def test_another_version_makes_it_stale(exported, monkeypatch, caplog):
    monkeypatch.setattr(single_file_reader, "TRANSFORM", "entry/9")
    load(exported)
    assert "made by another version" in caplog.text


def test_an_absent_source_is_as_it_was(exported, no_conversion):
    shards(exported)[0].unlink()
    load(exported)


def test_sources_and_file_are_hashed_once(exported, monkeypatch):
    load(exported)
    monkeypatch.setattr(
        "paroquant_stream.checkpoint.shard.hash_file", lambda *_: pytest.fail("source")
    )
    monkeypatch.setattr(single_file, "hash_parts", lambda *_: pytest.fail("file"))
    load(exported)


def test_digests_of_a_cache_writable_by_others_are_not_used(exported, tmp_path):
    load(exported)
    (tmp_path / "user-cache").chmod(0o777)
    with pytest.raises(StoreError, match="others can write into it"):
        load(exported)


def test_a_cache_that_cannot_be_made_costs_only_the_hashing(exported, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    load(exported, cache_dir=tmp_path / "file" / "cache")


def test_a_file_that_was_just_written_is_hashed_again(exported, monkeypatch):
    """Its stat may not show the next write: git's racy rule."""
    monkeypatch.setattr("paroquant_stream.files.descriptor.RACY_SECONDS", 3600)
    monkeypatch.setattr("paroquant_stream.files.descriptor.TICK_SECONDS", 3600)
    real, hashed = single_file.hash_parts, []
    monkeypatch.setattr(single_file, "hash_parts", lambda *a: hashed.append(a) or real(*a))
    load(exported)
    load(exported)
    assert len(hashed) == 2


def test_a_file_that_changed_meanwhile_is_hashed_again(exported, monkeypatch, caplog):
    real, hashed = single_file.hash_parts, []

    def hash_then_change(*arguments):
        digest = real(*arguments)
        if not hashed:
            flip(exported / NAME, uncovered(exported / NAME))
        hashed.append(digest)
        return digest

    monkeypatch.setattr(single_file, "hash_parts", hash_then_change)
    load(exported)
    assert "damaged" not in caplog.text
    load(exported)
    assert "damaged: expected XXH3" in caplog.text


def test_a_bit_flipped_behind_its_stat_is_found_by_full(exported, caplog):
    load(exported)
    path = exported / NAME
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        digest = read_header(file.fileno(), "x").metadata["xxh3"]
    data[-1] ^= 1
    path.write_bytes(data)
    remember(cache_store().digest_cache, path, digest)
    load(exported)
    assert "damaged" not in caplog.text
    load(exported, verify="full")
    assert "damaged: expected XXH3" in caplog.text


def test_parts_of_a_file_are_read_one_after_another_on_macos(alone, monkeypatch):
    """There MLX moves the offset of our descriptor, from which it reads the next header."""
    starts, real = [], mx.load

    def load_by_dup(path, **options):
        fd = int(path.removeprefix("/dev/fd/"))
        starts.append(os.lseek(fd, 0, os.SEEK_CUR))
        found = real(path, **options)
        os.lseek(fd, 0, os.SEEK_END)
        return found

    monkeypatch.setattr(mx, "load", load_by_dup)
    with single_file.opened(alone) as file:
        stored = single_file_reader.stored_in_file(file, Quantization(4, 128), lazy=False)
        parts = [stored.read(lambda name, part=part: part in name) for part in ("norm", "proj")]
    assert all(parts)
    assert starts == [0, 0]
