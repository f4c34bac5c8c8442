"""Tests of models whose shards were removed: found by their records, repaired, kept."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from paroquant_stream.api.load import load
from paroquant_stream.conversion import drop_source
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request, read_manifest
from paroquant_stream.errors import (
    CheckpointError,
    EntryDamagedError,
    SourceDroppedError,
    StoreError,
)
from paroquant_stream.maintenance.activity import demand_quiet
from paroquant_stream.maintenance.inventory import take_inventory
from paroquant_stream.maintenance.listing import make_row
from paroquant_stream.maintenance.prune import Rules, plan_prune, plan_removal
from paroquant_stream.maintenance.removal import execute
from paroquant_stream.store.damage import damaged_path
from paroquant_stream.store.drop_note import NOTE
from paroquant_stream.store.drop_record import read_records, record_ids
from paroquant_stream.store.store import Store, cache_store
from tests.helpers.builders import CONFIG, cut_apart, cut_evenly, llama_tensors, write_checkpoint


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
    """Two models that differ only in their weights, each with the weights it should load."""
    paths = [
        write_checkpoint(tmp_path / name, llama_tensors(seed), cut_evenly(3))
        for seed, name in enumerate(("one", "two"))
    ]
    return [(path, weights(path, cache_dir=tmp_path / f"right-{path.name}")) for path in paths]


@pytest.fixture
def dropped(model_dir):
    """A model whose shards were removed, with the weights it should load."""
    right = weights(model_dir, cache_dir=model_dir.parent / "right")
    run(model_dir, drop_source=True)
    return model_dir, right


def damage(path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [damage, os.unlink])
def test_any_lost_record_file_is_repaired_by_the_others(dropped, harm):
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


def test_lost_copies_are_rewritten_from_the_manifest(dropped):
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
def test_a_moved_model_loads_its_own_weights(dropped, tmp_path, config, in_place):
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


def test_swapped_twins_load_their_own_weights(twins, tmp_path):
    (one, first), (two, second) = twins
    for path in (one, two):
        run(path, drop_source=True)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    assert same(weights(one), second)
    assert same(weights(two), first)


def test_twins_without_notes_are_found_by_path_only(twins, tmp_path):
    (one, first), (two, second) = twins
    for path in (one, two):
        run(path, drop_source=True)
        (path / NOTE).unlink()
    assert same(weights(one), first)
    assert same(weights(two), second)
    two.rename(tmp_path / "elsewhere")
    assert same(weights(tmp_path / "elsewhere"), second)  # one still lies where it was dropped
    one.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").rename(tmp_path / "again")
    with pytest.raises(CheckpointError, match=rf"of two models .*{NOTE}"):
        load(tmp_path / "again")


def test_a_reused_path_keeps_both_models(twins, tmp_path):
    (one, first), (two, second) = twins
    run(one, drop_source=True)
    one.rename(tmp_path / "moved")
    two.rename(one)
    assert same(weights(one), second)
    assert same(weights(tmp_path / "moved"), first)
    assert same(weights(one), second)


def test_a_half_copied_model_is_not_mixed_with_a_dropped(twins):
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


def test_a_note_without_its_record_is_an_error(twins, tmp_path):
    (one, _), (two, _) = twins
    run(one, drop_source=True)
    run(two, drop_source=True, cache_dir=tmp_path / "other")
    shutil.rmtree(one)
    two.rename(one)
    with pytest.raises(SourceDroppedError, match=r"has no record of that for --dtype source"):
        load(one)
    load(one, cache_dir=tmp_path / "other")


def test_another_dtype_after_a_drop_names_the_stored_one(dropped):
    directory, _ = dropped
    with pytest.raises(SourceDroppedError, match=r"removed by --drop-source.*--dtype float16"):
        run(directory, dtype="float16")


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("options", "asked"),
    [({"dtype": "float16"}, "dtype='float16'"), ({"io_bits": 8}, "io_bits=8")],
)
def test_a_load_of_another_variant_says_what_to_pass(model_dir, in_place, options, asked):
    run(model_dir, in_place=in_place, drop_source=True, **options)
    with pytest.raises(SourceDroppedError, match=rf"--\S+ \S+ \(in Python {asked}\)"):
        load(model_dir)
    load(model_dir, **options)


def test_a_note_that_cannot_be_written_is_only_logged(model_dir, monkeypatch, caplog):
    from paroquant_stream.store import drop_note as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "new_file_in", full)
    run(model_dir, drop_source=True)
    assert "No space left" in caplog.text
    load(model_dir)


def test_prune_keeps_a_dropped_model_and_rm_removes_it(dropped, tmp_path):
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


def test_an_unreadable_record_keeps_every_entry(dropped):
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


def test_the_listing_shows_a_moved_model(twins, tmp_path):
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


def test_the_listing_shows_an_interrupted_conversion(model_dir, monkeypatch):
    from paroquant_stream.conversion import drop_source as drop

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(drop.SourceFile, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, drop_source=True)
    (model,) = take_inventory(cache_store()).models
    row = make_row(take_inventory(cache_store()), model)
    assert "was interrupted; run it again" in row.freshness.why


def test_a_damaged_only_copy_is_kept_until_converted_again(model_dir, tmp_path):
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


def test_damage_in_a_models_own_store_moves_nothing(model_dir):
    manifest = run(model_dir, drop_source=True, in_place=True).manifest
    store = make_request(model_dir, in_place=True).store
    damage(store.entry_path(manifest.entries[0].key))
    before = {p: p.read_bytes() for p in model_dir.rglob("*") if p.is_file()}
    with pytest.raises(
        EntryDamagedError, match="left in place, since the store is opened read-only"
    ):
        load(model_dir, verify="full")
    assert {p: p.read_bytes() for p in model_dir.rglob("*") if p.is_file()} == before


def test_another_model_never_gets_the_weights_of_a_dropped_one(twins):
    """Its config and index are equal, its shards not downloaded yet."""
    (one, first), (two, _) = twins
    run(one, drop_source=True)
    for path in two.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="absent shards"):
        load(two)
    assert same(weights(one), first)


def test_a_note_with_a_flipped_bit_is_none(dropped):
    directory, right = dropped
    note = json.loads((directory / NOTE).read_text())
    note["id"] = ("0" if note["id"][0] != "0" else "1") + note["id"][1:]
    (directory / NOTE).write_text(json.dumps(note))
    assert same(weights(directory), right)


def test_a_second_dtype_is_found_through_the_note_of_the_first(model_dir, tmp_path):
    right, keep = weights(model_dir, cache_dir=tmp_path / "right"), tmp_path / "keep"
    shutil.copytree(model_dir, keep)
    run(model_dir, drop_source=True)
    for path in keep.glob("*.safetensors"):
        shutil.copy2(path, model_dir / path.name)
    run(model_dir, drop_source=True, dtype="float16")
    model_dir.rename(tmp_path / "moved")
    assert same(weights(tmp_path / "moved"), right)


def test_a_model_used_while_rm_asks_keeps_its_records(dropped):
    directory, right = dropped
    inventory = take_inventory(cache_store())
    plan = plan_removal(inventory, inventory.models)
    os.utime(inventory.models[0].files[0].path)
    execute(plan)
    for path in cache_store().folder("manifests").iterdir():
        path.unlink()
    assert same(weights(directory), right)


@contextmanager
def interrupted_after(removals: int):
    """Ctrl-C after so many shards are removed."""
    real, done = drop_source.SourceFile.remove, []

    def remove(self):
        real(self)
        done.append(self.path.name)
        if len(done) == removals:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_source.SourceFile, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            yield done
    assert len(done) == removals


def test_an_older_tree_is_not_used_after_a_cut_in_place_drop(model_dir, tmp_path):
    first, second = llama_tensors(0), llama_tensors(1)
    homes = cut_evenly(3)(sorted(first))
    mixed = {n: (second if "00001" in homes[n] else first)[n] for n in homes}
    run(model_dir, in_place=True, drop_source=True)
    other = write_checkpoint(tmp_path / "other", mixed, cut_evenly(3))
    right = weights(other, cache_dir=tmp_path / "right")
    for path in other.glob("*.safetensors"):
        shutil.copy2(path, model_dir / path.name)
    with interrupted_after(1):
        run(model_dir, in_place=True, drop_source=True)
    with pytest.raises(SourceDroppedError):
        load(model_dir)  # the older tree fits no more, and the newer one is not complete
    run(model_dir, in_place=True, drop_source=True)
    assert same(weights(model_dir), right)


def test_a_damaged_entry_whose_lender_was_removed_is_kept(tmp_path):
    directory = write_checkpoint(tmp_path / "m", llama_tensors(), cut_apart(2))
    with interrupted_after(1) as done:
        run(directory, drop_source=True)
    (record,) = read_records(cache_store())
    (entry,) = [e for e in record.manifest.entries if e.shard not in done]
    assert entry.borrowed_sha256
    path = cache_store().entry_path(entry.key)
    damage(path)
    with pytest.raises(EntryDamagedError, match="kept as"):
        run(directory, drop_source=True)
    assert damaged_path(cache_store(), entry.key)


def test_rm_of_a_tree_waits_for_its_drop(model_dir):
    run(model_dir, in_place=True)
    store, refused = Store(model_dir / "mlx"), []

    def remove(self):
        with pytest.raises(StoreError, match="is locked"):
            demand_quiet(store)
        refused.append(self.path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_source.SourceFile, "remove", remove)
        run(model_dir, in_place=True, drop_source=True)
    assert len(refused) == 3
