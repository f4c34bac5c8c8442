"""The flow: only what changed is converted, and a run that was cut off goes on."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext

import pytest

from paroquant_stream.conversion import pipeline as shards
from paroquant_stream.conversion import planning, source_file
from paroquant_stream.conversion import staleness as staleness_module
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.conversion.staleness import staleness
from paroquant_stream.errors import StoreError
from paroquant_stream.files.digest_cache import SAMPLE_SIZE, SAMPLES
from paroquant_stream.maintenance.activity import demand_quiet
from paroquant_stream.store import drop_record
from paroquant_stream.store.format import OPERATION_VERSIONS
from tests.helpers.builders import cut_evenly, llama_tensors, temp_of, write_checkpoint
from tests.helpers.conversions import actions, flip_byte, reasons, run

pytestmark = pytest.mark.usefixtures("settled")


def test_the_first_run_converts_every_shard_and_the_second_none(model_dir):
    first, second = run(model_dir), run(model_dir)
    assert set(actions(first).values()) == {"converted"}
    assert set(reasons(first).values()) == {"never converted"}
    assert set(actions(second).values()) == {"reused"}
    assert second.manifest == first.manifest


def test_a_run_without_work_reads_a_sample_of_each_shard(model_dir, monkeypatch):
    run(model_dir)
    read, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, v, at: read.append(len(v[0])) or real(f, v, at))
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a shard was read"))
    assert set(actions(run(model_dir)).values()) == {"reused"}
    assert read == [SAMPLE_SIZE] * SAMPLES * 3


def test_one_changed_byte_rebuilds_exactly_its_entry(model_dir):
    run(model_dir)
    flip_byte(model_dir, 2, "model.layers.1.input_layernorm.weight")
    result = run(model_dir)
    assert actions(result) == {"1": "reused", "2": "converted", "3": "reused"}
    assert reasons(result)["2"] == "content changed"


def test_a_changed_borrowed_part_converts_the_borrower_again(scattered_dir):
    before = run(scattered_dir)
    scales = "model.layers.0.mlp.up_proj.scales"
    (lender,) = {r.shard for r in before.manifest.entries for t in r.tensors if t.name == scales}
    biases = scales.replace("scales", "biases")
    (borrower,) = {r.shard for r in before.manifest.entries for t in r.tensors if t.name == biases}
    assert lender != borrower
    flip_byte(scattered_dir, int(lender[6:11]), scales)
    result = run(scattered_dir)
    number = {shard: shard[6:11].lstrip("0") for shard in (lender, borrower)}
    assert reasons(result)[number[lender]] == "content changed"
    assert reasons(result)[number[borrower]] == "borrowed part changed"
    assert sorted(actions(result).values()) == ["converted", "converted", "reused"]


def test_moving_copying_and_touching_rebuild_nothing(model_dir, tmp_path):
    keys = [record.key for record in run(model_dir).manifest.entries]
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    moved = model_dir.rename(tmp_path / "moved")
    for path in moved.iterdir():
        path.touch()
    for directory in (copied, moved):
        result = run(directory)
        assert set(actions(result).values()) == {"reused"}
        assert [record.key for record in result.manifest.entries] == keys


def test_renaming_the_shards_rebuilds_nothing(tmp_path):
    tensors = llama_tensors()
    first = run(write_checkpoint(tmp_path / "a", tensors, cut_evenly(3)))

    def renamed(names):
        return {n: shard.replace("model", "weights") for n, shard in cut_evenly(3)(names).items()}

    second = run(write_checkpoint(tmp_path / "b", tensors, renamed))
    assert {report.action for report in second.shards} == {"reused"}
    assert [r.key for r in first.manifest.entries] == [r.key for r in second.manifest.entries]
    assert second.manifest.entries[0].shard.startswith("weights")


def test_the_same_content_gives_the_same_bytes_in_another_store(model_dir, tmp_path):
    one = run(model_dir, cache_dir=tmp_path / "one")
    two = run(model_dir, cache_dir=tmp_path / "two")
    assert [r.digest for r in one.manifest.entries] == [r.digest for r in two.manifest.entries]
    for record in one.manifest.entries:
        paths = [
            s.store.entry_path(record.key)
            for s in (make_request(model_dir, cache_dir=tmp_path / n) for n in ("one", "two"))
        ]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_lost_manifest_costs_no_conversion(model_dir):
    first = run(model_dir)
    first.manifest_path.unlink()
    second = run(model_dir)
    assert set(actions(second).values()) == {"reused"}
    assert second.manifest == first.manifest


@pytest.mark.parametrize("damage", [b"", b"x" * 100, b"PAROSTRM" + bytes(60)])
def test_a_damaged_manifest_reads_as_none(model_dir, damage):
    first = run(model_dir)
    first.manifest_path.write_bytes(damage)
    assert run(model_dir).manifest == first.manifest


def test_an_absent_or_short_entry_is_converted_again(model_dir, tmp_path):
    first = run(model_dir)
    store = make_request(model_dir).store
    gone, short, _ = (store.entry_path(r.key) for r in first.manifest.entries)
    whole = short.read_bytes()
    gone.unlink()
    short.write_bytes(whole[:-1])
    result = run(model_dir)
    assert actions(result) == {"1": "converted", "2": "converted", "3": "reused"}
    assert reasons(result)["1"] == "its entry is absent or damaged"
    assert short.read_bytes() == whole


def test_an_entry_with_a_foreign_header_is_converted_again(model_dir):
    first = run(model_dir)
    first.manifest_path.unlink()
    path = make_request(model_dir).store.entry_path(first.manifest.entries[0].key)
    good = path.read_bytes()
    path.write_bytes(good.replace(b"input_layernorm", b"input_layermorn"))
    assert path.read_bytes() != good
    assert actions(run(model_dir))["1"] == "converted"
    assert path.read_bytes() == good


def test_force_converts_everything_again(model_dir):
    run(model_dir)
    result = run(model_dir, force=True)
    assert set(reasons(result).values()) == {"forced"}


def test_a_new_operation_version_converts_only_its_shards(tmp_path, monkeypatch):
    tensors = llama_tensors()

    def cut(names):
        return {n: "b.safetensors" if n.endswith("norm.weight") else "a.safetensors" for n in names}

    directory = write_checkpoint(tmp_path / "m", tensors, cut)
    run(directory)
    monkeypatch.setitem(OPERATION_VERSIONS, "awq_weight", 2)
    monkeypatch.setattr(shards, "TRANSFORM", "newer")
    monkeypatch.setattr(staleness_module, "TRANSFORM", "newer")
    result = run(directory)
    assert [(r.shard, r.action) for r in result.shards] == [
        ("a.safetensors", "converted"),
        ("b.safetensors", "reused"),
    ]
    assert "version" in result.shards[0].why


def test_a_config_that_changes_no_entry_rebuilds_nothing(model_dir):
    run(model_dir)
    config = model_dir / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    result = run(model_dir)
    assert set(actions(result).values()) == {"reused"}
    assert staleness(make_request(model_dir), result.manifest) is None


def test_a_truncated_shard_is_named(model_dir, tmp_path):
    shard = model_dir / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"model-00002-of-00003.*download it again"):
        run(model_dir, cache_dir=tmp_path / "cache")


def test_in_place_writes_beside_the_model_and_names_no_path(model_dir, tmp_path):
    result = run(model_dir, in_place=True)
    assert result.manifest_path.is_relative_to(model_dir / "mlx")
    assert result.manifest_path.name.startswith("model-")
    moved = model_dir.rename(tmp_path / "moved")
    assert set(actions(run(moved, in_place=True)).values()) == {"reused"}


def test_a_cache_that_others_can_write_into_is_refused(model_dir):
    request = make_request(model_dir, jobs=1)
    convert(request)
    request.store.root.chmod(0o777)
    with pytest.raises(StoreError, match="chmod go-w"):
        run(model_dir)


def test_a_run_without_work_only_notes_that_the_model_was_used(model_dir):
    made = make_request(model_dir)
    convert(made)
    path = made.store.manifest_path(made.manifest_name)
    data = path.read_bytes()
    os.utime(path, (0, 0))
    convert(made)
    assert path.stat().st_mtime > 1e9
    assert path.read_bytes() == data


def test_a_cache_whose_times_cannot_be_set_serves_all_the_same(model_dir, monkeypatch):
    first, fired = run(model_dir), []

    def fail(*_arguments, **_options):
        fired.append(1)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", fail)
    assert run(model_dir).manifest == first.manifest
    assert fired == [1]


def test_work_that_another_run_did_meanwhile_is_not_done_again(model_dir, monkeypatch):
    real, other = planning.plan_model, []

    def plan_slowly(request):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "plan_model", real)
            other.append(run(model_dir))
        monkeypatch.setattr(shards, "work_of", lambda *_: pytest.fail("looked for work"))
        return real(request)

    monkeypatch.setattr(planning, "plan_model", plan_slowly)
    result = run(model_dir)
    assert set(actions(result).values()) == {"reused"}
    assert [result.manifest] == [first.manifest for first in other]


def test_a_run_with_work_holds_the_lock_of_its_manifest(model_dir, monkeypatch):
    real, refused = shards.work_of, []

    def look(request, model):
        with pytest.raises(StoreError, match=f"{request.manifest_name}.lock is held"):
            demand_quiet(request.store)
        refused.append(request.manifest_name)
        return real(request, model)

    monkeypatch.setattr(shards, "work_of", look)
    request = make_request(model_dir, jobs=1)
    convert(request)
    assert refused == [request.manifest_name]
    demand_quiet(request.store)


def test_a_shard_that_a_killed_run_renamed_is_a_shard_again(model_dir):
    shard = model_dir / "model-00002-of-00003.safetensors"
    shard.rename(model_dir / f".{shard.name}.0123456789abcdef.removing")
    assert set(actions(run(model_dir)).values()) == {"converted"}
    assert shard.exists()


@pytest.mark.parametrize("drop_source", [False, True])
def test_leftovers_that_cannot_be_renamed_stop_only_a_drop(model_dir, monkeypatch, drop_source):
    fired = []

    def refuse(*_):
        fired.append(1)
        raise StoreError("leftovers cannot be renamed")

    monkeypatch.setattr(source_file, "put_all_back", refuse)
    with pytest.raises(StoreError, match="leftovers") if drop_source else nullcontext():
        run(model_dir, drop_source=drop_source)
    assert fired
    assert len(list(model_dir.glob("*.safetensors"))) == 3


def test_what_could_not_be_loaded_is_converted_with_a_warning(model_dir, caplog):
    assert run(model_dir).shards
    assert caplog.text == ""
    config = model_dir / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"nosuch"'))
    assert set(actions(run(model_dir)).values()) == {"reused"}
    assert "nosuch" in caplog.text


def test_a_record_that_cannot_be_repaired_serves_all_the_same(model_dir, monkeypatch):
    first, fired = run(model_dir, drop_source=True), []

    def refuse(_):
        fired.append(1)
        raise StoreError("Read-only file system")

    monkeypatch.setattr(drop_record, "repair_records", refuse)
    assert run(model_dir).manifest == first.manifest
    assert fired


def test_a_run_without_work_sweeps_what_dead_runs_left(model_dir):
    run(model_dir)
    left = make_request(model_dir).store.folder("tmp") / temp_of(4194305)  # above any pid
    left.write_bytes(b"half of an entry")
    assert set(actions(run(model_dir)).values()) == {"reused"}
    assert not left.exists()


def test_only_a_cache_manifest_names_the_directory(model_dir):
    assert run(model_dir).manifest.directory == str(model_dir.resolve())
    assert run(model_dir, in_place=True).manifest.directory == ""


@pytest.mark.parametrize("lost", ["manifest", "path"])
def test_damage_from_before_its_record_was_lost_is_not_adopted(model_dir, tmp_path, lost):
    first = run(model_dir)
    store, record = make_request(model_dir).store, first.manifest.entries[0]
    right = store.entry_path(record.key).read_bytes()
    store.entry_path(record.key).write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    if lost == "manifest":
        first.manifest_path.unlink()
        directory = model_dir
    else:
        directory = model_dir.rename(tmp_path / "moved")
    again = run(directory)
    assert store.entry_path(record.key).read_bytes() == right
    assert [report.action for report in again.shards].count("converted") == 1
    assert again.manifest.entries == first.manifest.entries


def test_a_lost_entry_without_a_digest_is_converted_again(model_dir):
    first = run(model_dir)
    store, record = make_request(model_dir).store, first.manifest.entries[0]
    store.entry_path(record.key).with_suffix(".digest").unlink()
    assert {r.action for r in run(model_dir).shards} == {"reused"}  # the manifest has it
    first.manifest_path.unlink()
    again = run(model_dir)
    assert [report.action for report in again.shards].count("converted") == 1
    assert store.entry_digest(record.key) == record.digest


def test_a_missing_tokenizer_is_one_line_and_converts_anyway(model_dir, caplog):
    (model_dir / "tokenizer.json").unlink()
    assert set(actions(run(model_dir)).values()) == {"converted"}
    assert [message.startswith(f"{model_dir}: no tokenizer") for message in caplog.messages] == [
        True
    ]
    assert "\n" not in caplog.messages[0]
