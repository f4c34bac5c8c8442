"""`load`: what is converted, from where the model is read, and which damage is repaired."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

import paroquant_stream
from paroquant_stream import convert_checkpoint, load
from paroquant_stream.api import load as loading
from paroquant_stream.backends import backend
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    AssemblyError,
    CheckpointError,
    EntryDamagedError,
    MissingExtraError,
    MissingTokenizerError,
)
from paroquant_stream.exports.single_file_writer import export_single_file
from paroquant_stream.model import assemble, entries
from paroquant_stream.store.damage import take_out
from tests.helpers.builders import flip, remember, write_llama
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank

pytestmark = pytest.mark.usefixtures("settled")
VISION = FIXTURES / "qwen3_5-awq-adversarial"


def forbid_conversion(monkeypatch):
    """Fail at the private function that converts a shard, the work that the cache saves."""
    monkeypatch.setattr(
        "paroquant_stream.transform.task_runner._convert", lambda *_: pytest.fail("converted again")
    )


def test_load_converts_what_is_missing_and_nothing_else(model_dir, monkeypatch):
    load(model_dir)
    forbid_conversion(monkeypatch)
    load(model_dir)


def test_what_is_loaded_unpacks_and_has_names(model_dir):
    loaded = load(model_dir)
    model, tokenizer, is_vlm = loaded
    assert (loaded.model, loaded.tokenizer, loaded.is_vlm) == (model, tokenizer, is_vlm)
    assert (type(tokenizer).__name__, is_vlm) == ("TokenizerWrapper", False)


def test_a_load_records_that_the_model_was_used(model_dir):
    load(model_dir)
    made = make_request(model_dir)
    path = made.store.manifest_path(made.manifest_name)
    os.utime(path, (0, 0))
    load(model_dir)
    assert path.stat().st_mtime > 1e9


def test_the_given_cache_is_used(model_dir, tmp_path, monkeypatch):
    convert_checkpoint(model_dir, cache_dir=tmp_path / "elsewhere")
    forbid_conversion(monkeypatch)
    load(model_dir, cache_dir=tmp_path / "elsewhere")


def test_a_conversion_inside_the_model_is_used_first(model_dir, tmp_path, monkeypatch):
    convert_checkpoint(model_dir, in_place=True)
    forbid_conversion(monkeypatch)
    load(model_dir, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_stale_conversion_inside_the_model_is_not_used(model_dir, caplog):
    convert_checkpoint(model_dir, in_place=True)
    shard = model_dir / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        load(model_dir)
    assert "model-00003-of-00003.safetensors changed" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
def test_damaged_entries_are_converted_again(model_dir, count):
    entries, store = convert_checkpoint(model_dir).entries, make_request(model_dir).store
    paths = [store.entry_path(record.key) for record in entries[:count]]
    good = [path.read_bytes() for path in paths]
    for path in paths:
        flip(path, path.stat().st_size - 1)
    load(model_dir)
    assert [path.read_bytes() for path in paths] == good


def test_an_entry_that_is_damaged_again_is_an_error(model_dir, monkeypatch):
    record, tried = convert_checkpoint(model_dir).entries[0], []

    def read(_manifest, store, *_, **__):
        tried.append(store.entry_size(record.key))
        raise take_out(store, record, "damaged")

    monkeypatch.setattr(assemble, "read_weights", read)
    with pytest.raises(EntryDamagedError, match=record.key):
        load(model_dir)
    assert tried == [record.size] * 2  # it was made again in between


@pytest.mark.parametrize(("failures", "loads"), [(1, True), (2, False)])
def test_a_read_whose_failure_mlx_raises_twice_does_not_end_a_repair(
    model_dir, monkeypatch, failures, loads
):
    """One load in hundreds: the failure of a damaged entry comes again when the next are read."""
    manifest = convert_checkpoint(model_dir)
    record = manifest.entries[1]
    flip(make_request(model_dir).store.entry_path(record.key), record.size - 1)
    left, real = [None] * failures, assemble.mx.async_eval

    def evaluate(*arrays):
        if left:
            left.pop()
            raise RuntimeError("[read] Unable to read from file.")
        return real(*arrays)

    monkeypatch.setattr(assemble.mx, "async_eval", evaluate)
    if loads:
        load(model_dir)
    else:
        with pytest.raises(AssemblyError, match="MLX could not read the weights"):
            load(model_dir)
    assert not left


@pytest.mark.parametrize(
    ("model", "missing"), [("llama-awq-adversarial", "mlx_lm"), (VISION.name, "mlx_vlm")]
)
def test_a_missing_library_ends_a_load_before_work(monkeypatch, model, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == missing else real(name))
    forbid_conversion(monkeypatch)
    with pytest.raises(MissingExtraError, match=f"pip install {missing.replace('_', '-')}"):
        load(FIXTURES / model)


def test_the_text_part_needs_no_mlx_vlm(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda n: None if n == "mlx_vlm" else real(n))
    assert not load(VISION, force_text=True)[2]


def test_a_missing_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a model directory"):
        load(tmp_path / "absent")


def test_the_public_names_exist_and_no_other():
    for name in paroquant_stream.__all__:
        assert getattr(paroquant_stream, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = paroquant_stream.nothing


def test_full_verification_finds_what_the_stat_does_not_show(model_dir, monkeypatch):
    """The digest cache knows the changed file, as after a write that changed no time."""
    manifest = convert_checkpoint(model_dir)
    store = make_request(model_dir).store
    path = store.entry_path(manifest.entries[0].key)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    remember(store.digest_cache, path, manifest.entries[0].digest)
    load(model_dir)
    assert path.read_bytes() != good
    load(model_dir, verify="full")
    assert path.read_bytes() == good


def test_an_entry_truncated_during_a_load_is_converted_again(model_dir, monkeypatch):
    """MLX reads lazily; after a failed evaluation a second one would return zeros."""
    manifest = convert_checkpoint(model_dir)
    path = make_request(model_dir).store.entry_path(manifest.entries[0].key)
    good, real, cut = path.read_bytes(), assemble.read_weights, []

    def read_then_truncate(*arguments, **options):
        weights = real(*arguments, **options)
        if not cut:
            cut.append(path)
            os.truncate(path, len(good) // 2)
        return weights

    monkeypatch.setattr(assemble, "read_weights", read_then_truncate)
    loaded, _, _ = load(model_dir)
    assert cut
    assert path.read_bytes() == good
    expected = load(model_dir)[0].model.norm.weight
    assert loaded.model.norm.weight.tolist() == expected.tolist()


def test_an_entry_truncated_while_joined_is_converted_again(tmp_path, monkeypatch):
    """Joined pieces are evaluated before all else, under the same guard."""
    directory, cache = FIXTURES / "qwen3_moe-awq-adversarial", tmp_path / "cache"
    manifest = convert_checkpoint(directory, cache_dir=cache)
    store = make_request(directory, cache_dir=cache).store
    pieces = [r for r in manifest.entries if any(".experts_" in t.name for t in r.tensors)]
    path = store.entry_path(pieces[0].key)
    good, real, cut = path.read_bytes(), entries.join_pieces, []

    def truncate_then_join(found, lazy):
        if not cut:
            cut.append(path)
            os.truncate(path, 20_000)
        return real(found, lazy)

    monkeypatch.setattr(entries, "join_pieces", truncate_then_join)
    load(directory, cache_dir=cache)
    assert cut
    assert path.read_bytes() == good


def test_a_text_load_never_imports_mlx_vlm():
    code = (
        "import sys; from paroquant_stream import load; load(sys.argv[1], force_text=True);"
        "print({'mlx_lm', 'mlx_vlm'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(VISION)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "{'mlx_lm'}\n"


def test_text_and_vision_parts_load_from_the_same_entries(monkeypatch):
    before = convert_checkpoint(VISION)
    forbid_conversion(monkeypatch)
    load(VISION, force_text=True)
    load(VISION)
    assert convert_checkpoint(VISION) == before


def forbid(monkeypatch, name):
    """Fail at a call of a function that the module `api.load` uses."""
    monkeypatch.setattr(loading, name, lambda *_: pytest.fail(f"{name} was called"))


def test_a_directory_with_a_pipe_is_refused_before_a_conversion(model_dir, monkeypatch):
    forbid(monkeypatch, "convert")
    os.mkfifo(model_dir / "merges.txt")
    with pytest.raises(CheckpointError, match="found a pipe"):
        load(model_dir)


def test_damage_that_no_shard_can_repair_is_an_error(model_dir):
    manifest = convert_checkpoint(model_dir, in_place=True, drop_source=True)
    store = make_request(model_dir, in_place=True).store
    assert list(model_dir.glob("*.safetensors")) == []
    flip(store.entry_path(manifest.entries[0].key), manifest.entries[0].size - 1)
    with pytest.raises(EntryDamagedError, match=manifest.entries[0].key):
        load(model_dir)


def test_without_shards_the_error_names_no_unused_file(model_dir):
    for shard in model_dir.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        load(model_dir)
    assert "not used" not in str(caught.value)


def test_the_single_file_serves_the_source_dtype_alone(model_dir, tmp_path, monkeypatch):
    export_single_file(make_request(model_dir), beside_shards=True)
    load(model_dir, dtype="float16", cache_dir=tmp_path / "float16")
    assert list((tmp_path / "float16").rglob("*.safetensors"))
    forbid(monkeypatch, "convert")
    load(model_dir)


def test_a_current_single_file_that_fits_no_model_is_an_error(tmp_path, monkeypatch):
    directory = write_llama(tmp_path, **{"model.extra.weight": np.ones(4, np.float16)})
    export_single_file(make_request(directory), beside_shards=True)
    forbid(monkeypatch, "convert")
    with pytest.raises(AssemblyError, match=r"model\.extra\.weight: no such parameter"):
        load(directory)


def test_only_a_part_by_layers_needs_some_entries_alone(model_dir, monkeypatch):
    asked = []

    def record(request, progress, trace, needed, *_):
        asked.append(needed)
        raise CheckpointError("no conversion")

    monkeypatch.setattr(loading, "convert", record)
    for options in ({}, {"layers": range(1)}, {"group": Rank(0, 2), "parallel": "tensor"}):
        with pytest.raises(CheckpointError, match="no conversion"):
            load(model_dir, **options)
    assert [needed is None for needed in asked] == [True, False, True]


def test_another_kind_of_verification_is_refused(model_dir):
    with pytest.raises(ValueError, match="verify is one of header, full, not 'ful'"):
        load(model_dir, verify="ful")


def test_each_phase_is_logged(model_dir, caplog):
    caplog.set_level("INFO", logger="paroquant_stream")
    load(model_dir, jobs=1)
    first_words = [m.removeprefix(f"{model_dir}: ").split()[0] for m in caplog.messages]
    shards = [f"model-0000{number}-of-00003.safetensors:" for number in (1, 2, 3)]
    assert first_words == [
        *("looking", "planned,", "converting", *shards),
        *("opening", "building", "reading", "loaded"),
    ]
    shard = model_dir / "model-00001-of-00003.safetensors"
    os.utime(shard)
    load(model_dir)
    assert f"{shard}: hashing" in caplog.text


def test_without_a_tokenizer_nothing_is_converted(model_dir, monkeypatch):
    (model_dir / "tokenizer.json").unlink()
    forbid(monkeypatch, "convert")
    with pytest.raises(MissingTokenizerError, match=r"expected tokenizer\.json,.* copy"):
        load(model_dir)


def test_the_model_alone_with_another_config(model_dir):
    model, tokenizer, _ = load(model_dir, model_config={"rms_norm_eps": 0.5}, tokenizer=False)
    assert tokenizer is None
    assert model.args.rms_norm_eps == 0.5
