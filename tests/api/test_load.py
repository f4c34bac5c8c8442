"""convert_checkpoint() and load()."""

from __future__ import annotations

import logging
import os

import pytest

import paroquant_stream
from paroquant_stream import Manifest, convert_checkpoint, load
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import AssemblyError, CheckpointError
from tests.helpers.builders import remember

pytestmark = pytest.mark.usefixtures("settled")


def no_conversion(monkeypatch):
    monkeypatch.setattr(
        "paroquant_stream.transform.task_runner._convert", lambda *_: pytest.fail("converted again")
    )


def test_gives_the_manifest(model_dir):
    manifest = convert_checkpoint(model_dir)
    assert isinstance(manifest, Manifest)
    assert manifest.layout == "AUTOAWQ"
    assert len(manifest.entries) == 3


def test_load_converts_what_is_missing_and_nothing_else(model_dir, monkeypatch):
    load(model_dir)
    no_conversion(monkeypatch)
    load(model_dir)


def test_a_load_notes_that_the_model_was_used(model_dir):
    load(model_dir)
    made = make_request(model_dir)
    path = made.store.manifest_path(made.manifest_name)
    os.utime(path, (0, 0))
    load(model_dir)
    assert path.stat().st_mtime > 1e9


def test_load_uses_the_cache_that_it_is_told(model_dir, tmp_path, monkeypatch):
    convert_checkpoint(model_dir, cache_dir=tmp_path / "elsewhere")
    no_conversion(monkeypatch)
    load(model_dir, cache_dir=tmp_path / "elsewhere")


def test_a_conversion_beside_the_model_is_used_first(model_dir, tmp_path, monkeypatch):
    convert_checkpoint(model_dir, in_place=True)
    no_conversion(monkeypatch)
    load(model_dir, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_stale_conversion_beside_the_model_is_skipped_with_the_reason(model_dir, caplog):
    convert_checkpoint(model_dir, in_place=True)
    shard = model_dir / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        load(model_dir)
    assert "model-00003-of-00003.safetensors changed" in caplog.text


def test_a_damaged_entry_is_converted_again_and_the_right_weights_are_loaded(model_dir):
    manifest = convert_checkpoint(model_dir)
    path = make_request(model_dir).store.entry_path(manifest.entries[1].key)
    good = path.read_bytes()
    bad = bytearray(good)
    bad[-1] ^= 1
    path.write_bytes(bad)
    load(model_dir)
    assert path.read_bytes() == good


def test_a_missing_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a model directory"):
        load(tmp_path / "absent")


def test_the_public_names_are_there_and_no_other():
    for name in paroquant_stream.__all__:
        assert getattr(paroquant_stream, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = paroquant_stream.nothing


def test_two_threads_that_load_one_cold_model_convert_it_once(model_dir, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from paroquant_stream.transform import task_runner as transform

    real, converted = transform._convert, []

    def counted(job, *rest):
        converted.append(job.task.shard)
        return real(job, *rest)

    monkeypatch.setattr(transform, "_convert", counted)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: convert_checkpoint(model_dir, jobs=1), range(2)))
    assert len(converted) == 3


def test_full_verification_finds_what_the_stat_does_not_show(model_dir, monkeypatch):
    """The memo made to fit, as after a write through a mapping that no time shows."""
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


def test_an_entry_cut_short_while_it_is_loaded_is_converted_again(model_dir, monkeypatch):
    """MLX reads lazily: the second eval of an array whose first failed would give zeros."""
    import os

    from paroquant_stream.model import assemble as model

    manifest = convert_checkpoint(model_dir)
    path = make_request(model_dir).store.entry_path(manifest.entries[0].key)
    good, real, cut = path.read_bytes(), model.read_weights, []

    def read_then_cut(*arguments, **options):
        weights = real(*arguments, **options)
        if not cut:
            cut.append(path)
            os.truncate(path, len(good) // 2)
        return weights

    monkeypatch.setattr(model, "read_weights", read_then_cut)
    loaded, _, _ = load(model_dir)
    assert cut
    assert path.read_bytes() == good
    wanted = load(model_dir)[0].model.norm.weight
    assert loaded.model.norm.weight.tolist() == wanted.tolist()


def test_an_entry_cut_short_while_stacks_are_joined_is_converted_again(tmp_path, monkeypatch):
    """Pieces of experts are evaluated before the rest: the same guard must hold there."""
    import os

    from paroquant_stream.model import entries as weights
    from tests.helpers.paths import FIXTURES

    directory, cache = FIXTURES / "qwen3_moe-awq-adversarial", tmp_path / "cache"
    manifest = convert_checkpoint(directory, cache_dir=cache)
    store = make_request(directory, cache_dir=cache).store
    pieces = [r for r in manifest.entries if any(".experts_" in t.name for t in r.tensors)]
    path = store.entry_path(pieces[0].key)
    good, real, cut = path.read_bytes(), weights.join_pieces, []

    def cut_then_join(found, lazy):
        if not cut:
            cut.append(path)
            os.truncate(path, 20_000)
        return real(found, lazy)

    monkeypatch.setattr(weights, "join_pieces", cut_then_join)
    load(directory, cache_dir=cache)
    assert cut
    assert path.read_bytes() == good


def test_a_failure_of_mlx_with_sound_entries_is_raised(model_dir, monkeypatch):
    import mlx.core as mx

    convert_checkpoint(model_dir)

    def fail(*_):
        raise RuntimeError("[read] Unable to read from file.")

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(AssemblyError, match="MLX could not read the weights"):
        load(model_dir)


def test_weights_that_the_machine_cannot_hold_are_refused_before_they_are_read(
    model_dir, monkeypatch
):
    convert_checkpoint(model_dir)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}[name])
    with pytest.raises(AssemblyError, match=r"this machine has 1,000; lazy=True"):
        load(model_dir)
    load(model_dir, lazy=True)
