"""What a store holds: models, entries, sharing, and files that no manifest names."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.conversion.request import model_id
from paroquant_stream.maintenance.inventory import claimed_keys, take_inventory
from paroquant_stream.store.store import Store
from tests.helpers.builders import cut_evenly, write_checkpoint
from tests.helpers.manifests import manifest_of

pytestmark = pytest.mark.usefixtures("settled")


def test_a_model_is_found_with_its_directory_and_bytes(store, model_dir):
    inventory = take_inventory(store)
    (model,) = inventory.models
    assert (model.name, model.directory) == (str(model_dir), model_dir)
    assert not any((model.is_orphan, model.is_damaged, model.newer, model.only_copy))
    sizes = [path.stat().st_size for path in store.folder("entries").rglob("*.safetensors")]
    assert (len(sizes), inventory.entry_bytes(model)) == (3, sum(sizes))
    assert inventory.unclaimed == {}
    assert claimed_keys(store) == set(inventory.entries)


def test_an_absent_cache_is_empty_and_stays_absent(tmp_path):
    inventory = take_inventory(Store(tmp_path / "absent"))
    assert (inventory.models, inventory.entries, inventory.size) == ((), {}, 0)
    assert not (tmp_path / "absent").exists()


def test_everything_on_disk_is_counted_but_tag_and_locks(store):
    (store.root / "0123456789abcdef").mkdir()
    (store.root / "0123456789abcdef" / "converted_mlx.safetensors").write_bytes(b"123")
    files = [p for p in store.root.rglob("*") if p.is_file() and p.parent.name != "locks"]
    memo = sum(p.stat().st_size for p in store.folder("memo").iterdir())
    tag = (store.root / "CACHEDIR.TAG").stat().st_size
    assert take_inventory(store).size == sum(p.stat().st_size for p in files) - memo - tag


def test_entries_are_claimed_by_every_model_that_names_them(store, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "copy")
    convert_checkpoint(tmp_path / "copy")
    inventory = take_inventory(store)
    ids = {model_id(model_dir), model_id(tmp_path / "copy")}
    assert all(claimants == ids for claimants in inventory.claims.values())
    assert len(inventory.entries) == 3


def test_entries_without_a_manifest_are_unclaimed(store):
    path, _ = manifest_of(store)
    path.unlink()
    inventory = take_inventory(store)
    assert len(inventory.unclaimed) == 3
    assert inventory.models == ()


def test_a_newer_manifest_makes_claims_unknown(store):
    path, _ = manifest_of(store)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    (model,) = take_inventory(store).models
    assert (model.is_damaged, model.newer) == (True, False)
    assert claimed_keys(store) == set()
    data[10:12] = (3).to_bytes(2, "little")  # the major version
    path.write_bytes(data)
    (model,) = take_inventory(store).models
    assert (model.is_damaged, model.newer) == (False, True)
    assert claimed_keys(store) is None


def test_a_manifest_that_cannot_be_read_now_makes_claims_unknown(store, monkeypatch):
    real = os.open

    def fail(path, *rest, **named):
        if str(path).endswith(".msgpack"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", fail)
    assert claimed_keys(store) is None


def test_links_and_strangers_are_neither_counted_nor_read(store, tmp_path):
    path, manifest = manifest_of(store)
    before = take_inventory(store)
    victim = tmp_path / "victim"
    victim.write_bytes(manifest.encode())
    entries = store.folder("entries")
    path.with_name(f"{'0' * 64}.msgpack").symlink_to(victim)
    path.with_name("notes.msgpack").write_bytes(b"mine")
    (entries / "00").symlink_to(tmp_path)
    (tmp_path / f"{'0' * 64}.safetensors").write_bytes(b"mine")
    (entries / "11").mkdir(exist_ok=True)
    (entries / "11" / f"{'1' * 64}.safetensors").symlink_to(victim)
    (entries / "11" / f"{'2' * 64}.safetensors").write_bytes(b"in the wrong directory")
    (entries / "11" / "notes.txt").write_bytes(b"mine")
    store.folder("memo").joinpath("1-2-3").symlink_to(victim)
    assert replace(take_inventory(store, before.time), time=before.time) == before


def test_only_digests_of_entries_and_shards_are_known(store, model_dir):
    assert len(list(store.folder("memo").iterdir())) == 6
    assert take_inventory(store).memos == ()
    (model_dir / "model-00001-of-00003.safetensors").unlink()
    assert len(take_inventory(store).memos) == 1


def test_only_the_users_cache_is_searched_for_paroquants_own(tmp_path):
    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef" / "converted_mlx.safetensors").write_bytes(b"123")
    assert len(take_inventory(Store(tmp_path)).foreign) == 1
    assert take_inventory(Store(tmp_path, private=False)).foreign == ()


def test_two_models_may_be_in_one_cache(store, tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path / "b", cut=cut_evenly(2)))
    assert [m.name for m in take_inventory(store).models] == [
        str(tmp_path / "b"),
        str(tmp_path / "model"),
    ]
