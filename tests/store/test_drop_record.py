"""Records of removed sources: kept twice, found by what a model is, and never mixed up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from paroquant_stream.api.load import load
from paroquant_stream.cli.cache_listing import make_row
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request, read_manifest
from paroquant_stream.errors import (
    CheckpointError,
    EntryDamagedError,
    ManifestError,
    NewerManifestError,
    SourceDroppedError,
    StoreError,
)
from paroquant_stream.files.folder import Folder
from paroquant_stream.maintenance.inventory import take_inventory
from paroquant_stream.maintenance.prune import Rules, plan_prune, plan_removal
from paroquant_stream.maintenance.removal import execute
from paroquant_stream.store.damage import damaged_path
from paroquant_stream.store.drop_record import (
    NOTE,
    DropRecord,
    read_note,
    read_records,
    record_ids,
    repair_records,
    write_note,
)
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import CONFIG, cut_evenly, llama_tensors, write_checkpoint


def run(directory, **options):
    return convert(make_request(directory, jobs=1, **options))


def weights(directory, **options) -> dict[str, mx.array]:
    model, _, _ = load(directory, **options)
    return dict(tree_flatten(model.parameters()))


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and mx.array_equal(one[name], two[name]) for name in one
    )


@pytest.fixture
def twins(tmp_path):
    """Two models of equal config and index and other weights, and what each should load."""
    paths = [
        write_checkpoint(tmp_path / name, llama_tensors(seed), cut_evenly(3))
        for seed, name in enumerate(("one", "two"))
    ]
    return [(path, weights(path, cache_dir=tmp_path / f"right-{path.name}")) for path in paths]


@pytest.fixture
def dropped(model_dir):
    """A model without sources, and what it should load."""
    right = weights(model_dir, cache_dir=model_dir.parent / "right")
    run(model_dir, drop_source=True)
    return model_dir, right


def note(directory, drop_id: str) -> None:
    with Folder.open(directory) as home:
        write_note(home, drop_id)


def damage(path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_record_comes_back_as_it_was_and_no_other_bytes_are_one(dropped):
    (record,) = read_records(cache_store())
    data = record.encode()
    assert DropRecord.decode(record.id, data) == record
    for position in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with pytest.raises(ManifestError):
            DropRecord.decode(record.id, bytes(flipped))
    with pytest.raises(ManifestError):
        DropRecord.decode(record.id, data[:-1])
    with pytest.raises(NewerManifestError):
        DropRecord.decode(record.id, data[:10] + b"\x63" + data[11:])


@pytest.mark.parametrize("harm", [damage, os.unlink])
def test_whichever_record_file_is_lost_the_model_loads_and_the_others_heal_it(dropped, harm):
    directory, right = dropped
    store = cache_store()
    files = [*store.folder("dropped").iterdir(), *store.folder("manifests").iterdir()]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        harm(path)
        assert same(weights(directory), right)
        assert path.exists()
        if path.parent.name == "dropped":
            assert path.read_bytes() == whole
    assert same(weights(directory), right)


def test_both_copies_are_made_anew_from_the_manifest(dropped):
    directory, right = dropped
    store = cache_store()
    for path in store.folder("dropped").iterdir():
        path.unlink()
    (directory / NOTE).unlink()  # as an older version left it
    assert same(weights(directory), right)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"note": 1}))
    with pytest.raises(CheckpointError, match="absent shards"):  # of which no header was kept
        run(directory)


@pytest.mark.parametrize(
    ("config", "in_place"),
    [(CONFIG, False), (CONFIG | {"eos_token_id": 1}, False), (CONFIG, True)],
)
def test_a_model_that_moved_loads_its_own_weights(dropped, tmp_path, config, in_place):
    directory, right = dropped
    if in_place:
        directory = write_checkpoint(tmp_path / "shipped", cut=cut_evenly(3))
        run(directory, drop_source=True, in_place=True)
    moved = tmp_path / "moved"
    directory.rename(moved)
    (moved / "config.json").write_text(json.dumps(config))
    assert same(weights(moved), right)
    moved.rename(directory)
    assert same(weights(directory), right)


def test_twins_that_were_dropped_and_changed_places_each_load_their_own_weights(twins, tmp_path):
    (one, first), (two, second) = twins
    for path in (one, two):
        run(path, drop_source=True)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    assert same(weights(one), second)
    assert same(weights(two), first)


def test_twins_whose_notes_were_lost_are_told_apart_by_their_paths_or_not_at_all(twins, tmp_path):
    (one, first), (two, second) = twins
    for path in (one, two):
        run(path, drop_source=True)
        (path / NOTE).unlink()
    assert same(weights(one), first)
    assert same(weights(two), second)
    two.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"of two models .*{NOTE}"):
        load(tmp_path / "elsewhere")


def test_a_path_that_another_model_has_now_keeps_both_models(twins, tmp_path):
    (one, first), (two, second) = twins
    run(one, drop_source=True)
    one.rename(tmp_path / "moved")
    two.rename(one)
    assert same(weights(one), second)
    assert same(weights(tmp_path / "moved"), first)
    assert same(weights(one), second)


def test_a_model_that_was_half_copied_over_a_dropped_one_is_not_completed_by_it(twins):
    (one, _), (two, second) = twins
    run(one, drop_source=True)
    names = sorted(path.name for path in two.glob("*.safetensors"))
    for name in names[:2]:
        shutil.copy(two / name, one / name)
    with pytest.raises(SourceDroppedError, match=f"{names[0]}: expected SHA-256"):
        load(one)
    (one / NOTE).unlink()
    with pytest.raises(SourceDroppedError, match=f"{names[0]}: expected SHA-256"):
        load(one)
    shutil.copy(two / names[2], one / names[2])
    assert same(weights(one), second)


def test_a_directory_without_shards_that_says_which_drop_it_was_takes_no_other(twins, tmp_path):
    (one, _), (two, _) = twins
    run(one, drop_source=True)
    run(two, drop_source=True, cache_dir=tmp_path / "other")
    shutil.rmtree(one)
    two.rename(one)
    with pytest.raises(SourceDroppedError, match=r"has no record of that for --dtype source"):
        load(one)
    load(one, cache_dir=tmp_path / "other")


def test_another_dtype_after_a_drop_says_what_there_is(dropped):
    directory, _ = dropped
    with pytest.raises(SourceDroppedError, match=r"removed by --drop-source.*--dtype float16"):
        run(directory, dtype="float16")


def test_a_damaged_note_is_none_and_a_link_is_not_followed(tmp_path):
    note(tmp_path, "a" * 64)
    assert read_note(tmp_path) == "a" * 64
    for text in ("", "[]", '{"id": 5}', '{"id": "../x"}', "{" * 10):
        (tmp_path / NOTE).write_text(text)
        assert read_note(tmp_path) is None
    (tmp_path / NOTE).unlink()
    (tmp_path / "other").write_text(json.dumps({"id": "a" * 64}))
    (tmp_path / NOTE).symlink_to("other")
    assert read_note(tmp_path) is None
    note(tmp_path, "b" * 64)
    assert "a" * 64 in (tmp_path / "other").read_text()
    assert read_note(tmp_path) == "b" * 64


def test_a_note_that_cannot_be_written_is_only_logged(model_dir, monkeypatch, caplog):
    from paroquant_stream.store import drop_record as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "new_file_in", full)
    run(model_dir, drop_source=True)
    assert "No space left" in caplog.text
    load(model_dir)


def test_no_rule_of_prune_touches_a_dropped_model_and_only_rm_removes_it(dropped, tmp_path):
    directory, right = dropped
    store = cache_store()
    directory.rename(tmp_path / "moved")
    for path in store.folder("manifests").iterdir():
        path.unlink()
    for rules in (Rules(orphans=True), Rules(max_size=0), Rules(older_than=0.0)):
        execute(plan_prune(take_inventory(store, now=4e9), rules))
    assert same(weights(tmp_path / "moved"), right)
    inventory = take_inventory(store)
    (model,) = inventory.models
    assert model.only_copy
    assert model.directory == tmp_path / "moved"
    execute(plan_removal(inventory, [model]))
    assert record_ids(store) == []
    assert not take_inventory(store).entries


def test_a_record_that_nobody_can_read_keeps_every_entry_until_it_is_removed(dropped):
    store = cache_store()
    for path in (*store.folder("dropped").iterdir(), *store.folder("manifests").iterdir()):
        damage(path)
    execute(plan_prune(take_inventory(store, now=4e9), Rules(orphans=True)))
    inventory = take_inventory(store, now=4e9)
    assert len(inventory.entries) == 3
    (unreadable,) = [model for model in inventory.models if model.newer]
    execute(plan_removal(inventory, [unreadable]))
    execute(plan_prune(take_inventory(store, now=4e9), Rules(orphans=True)))
    assert not take_inventory(store).entries


def test_the_listing_says_where_a_dropped_model_is_gone(twins, tmp_path):
    (one, _), (two, _) = twins
    run(one, drop_source=True)
    one.rename(tmp_path / "moved")
    two.rename(one)
    run(one)
    rows = [
        make_row(take_inventory(cache_store()), m) for m in take_inventory(cache_store()).models
    ]
    states = {row.model.name.partition("#")[0]: row.freshness for row in rows if row.model.moved}
    assert "was moved or holds another model" in states[str(one)].why
    assert len(rows) == 2


def test_a_conversion_that_was_cut_off_is_listed_as_such(model_dir, monkeypatch):
    from paroquant_stream.conversion import drop_source as drop

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(drop.SourceFile, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, drop_source=True)
    (model,) = take_inventory(cache_store()).models
    row = make_row(take_inventory(cache_store()), model)
    assert "cut off; run it again" in row.freshness.why


def test_damage_of_the_only_copy_is_kept_and_the_shard_heals_it(model_dir, tmp_path):
    backup = shutil.copytree(model_dir, tmp_path / "backup")
    manifest = run(model_dir, drop_source=True).manifest
    store, record = cache_store(), manifest.entries[1]
    damage(store.entry_path(record.key))
    broken = store.entry_path(record.key).read_bytes()
    with pytest.raises(
        SourceDroppedError, match=f"{record.shard}: its entry is damaged, and kept as"
    ):
        load(model_dir, verify="full")
    for rules in (Rules(orphans=True), Rules(max_size=0)):
        execute(plan_prune(take_inventory(store, now=4e9), rules))
    assert damaged_path(store, record.key).read_bytes() == broken
    shutil.copy(backup / record.shard, model_dir / record.shard)
    load(model_dir)
    execute(plan_prune(take_inventory(store, now=4e9), Rules()))
    assert damaged_path(store, record.key) is None
    assert read_manifest(make_request(model_dir)).entries[1].key == record.key


def test_damage_of_a_conversion_beside_the_model_moves_nothing(model_dir):
    manifest = run(model_dir, drop_source=True, in_place=True).manifest
    store = make_request(model_dir, in_place=True).store
    damage(store.entry_path(manifest.entries[0].key))
    before = {p: p.read_bytes() for p in model_dir.rglob("*") if p.is_file()}
    with pytest.raises(
        EntryDamagedError, match="left in place, since the store is opened read-only"
    ):
        load(model_dir, verify="full")
    assert {p: p.read_bytes() for p in model_dir.rglob("*") if p.is_file()} == before


def test_healing_is_of_the_copy_that_was_written_last(dropped):
    store = cache_store()
    (drop_id,) = record_ids(store)
    first, second = sorted(store.folder("dropped").iterdir())
    newest = first.read_bytes()
    damage(second)
    repair_records(store)
    assert second.read_bytes() == newest
    damage(first)
    repair_records(store)
    assert first.read_bytes() == newest
    assert [record.id for record in read_records(store)] == [drop_id]


def test_a_note_replaces_what_a_killed_run_left_of_one(tmp_path):
    code = "from paroquant_stream.files.temp_files import name_beside; print(name_beside('{}'))"
    command = [sys.executable, "-c", code.format(NOTE)]
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / left).touch()
    note(tmp_path, "a" * 64)
    assert read_note(tmp_path) == "a" * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == [NOTE]


@pytest.fixture
def full_disk(monkeypatch):
    """No note can be written."""

    @contextmanager
    def fail(*_):
        raise StoreError("no space")
        yield

    monkeypatch.setattr("paroquant_stream.store.drop_record.new_file_in", fail)


def test_a_note_of_another_drop_goes_when_it_cannot_be_replaced(tmp_path, full_disk):
    (tmp_path / NOTE).write_text(json.dumps({"id": "a" * 64}))
    note(tmp_path, "b" * 64)
    assert read_note(tmp_path) is None


def test_a_note_that_cannot_go_either_is_an_error(tmp_path, full_disk):
    (tmp_path / NOTE).mkdir()  # unlink fails
    with pytest.raises(StoreError, match="names another drop and can be neither replaced"):
        note(tmp_path, "b" * 64)
