"""The plan of a removal: what goes, and what must not."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.conversion.request import model_id
from paroquant_stream.errors import StoreError
from paroquant_stream.maintenance.inventory import Inventory, take_inventory
from paroquant_stream.maintenance.prune import PrunePlan, Rules, plan_prune, plan_removal
from paroquant_stream.store.manifest import Manifest
from paroquant_stream.store.store import Store
from tests.helpers.builders import temp_of

pytestmark = pytest.mark.usefixtures("settled")
DAY = 86_400.0


@pytest.fixture
def store(three_models) -> Store:
    return three_models


def manifest_path(store: Store, directory: Path) -> Path:
    return store.manifest_path(model_id(directory))


def use(store: Store, directory: Path, days_ago: float) -> None:
    """Sets when the model was last used."""
    path = manifest_path(store, directory)
    when = path.stat().st_mtime - days_ago * DAY
    os.utime(path, (when, when))


def later(store: Store, seconds: float = 7200) -> Inventory:
    """The inventory as of two hours from now."""
    import time

    return take_inventory(store, time.time() + seconds)


def names(plan: PrunePlan) -> list[str]:
    return [Path(model.name).name for model in plan.models]


def mark_dropped(store: Store, directory: Path) -> None:
    path = manifest_path(store, directory)
    manifest = Manifest.decode(path.read_bytes())
    records = tuple(replace(record, dropped=True) for record in manifest.entries)
    path.write_bytes(replace(manifest, entries=records).encode())


def pick(inventory: Inventory, *expected: str):
    return [model for model in inventory.models if Path(model.name).name in expected]


def test_entries_that_two_models_share_stay_until_both_go(store):
    inventory = take_inventory(store)
    plan = plan_removal(inventory, pick(inventory, "a"))
    assert plan.entries == {}
    assert plan.freed == plan.models[0].files[0].size
    both = plan_removal(inventory, pick(inventory, "a", "b"))
    assert len(both.entries) == 3
    assert both.freed_by(both.models[0]) == sum(file.size for file in both.entries.values())


def test_a_clean_cache_has_nothing_to_prune(store):
    plan = plan_prune(later(store), Rules())
    assert plan.is_empty
    assert (plan.freed, plan.kept) == (0, ())


def test_plain_prune_removes_what_is_surely_useless(store, tmp_path):
    temp = store.folder("tmp") / temp_of(4194305)
    temp.write_bytes(b"1234")
    live = store.folder("tmp") / temp_of(os.getppid())
    live.write_bytes(b"1234")
    os.utime(live, (0, 0))
    memo = store.folder("memo") / "1-2-3"
    memo.write_bytes(b"[]")
    path = manifest_path(store, tmp_path / "c")
    os.truncate(path, 10)
    live.unlink()
    plan = plan_prune(later(store), Rules())
    assert [file.path for file in plan.dead_temps] == [temp]
    assert [file.path for model in plan.models for file in model.files] == [path]
    assert plan.entries == {}  # a conversion of c can go on with them
    assert plan.memos == ()  # and needs its memos
    path.unlink()
    for key in take_inventory(store).unclaimed:
        store.entry_path(key).unlink()
    assert memo in [file.path for file in plan_prune(later(store), Rules()).memos]
    assert memo not in [file.path for file in plan_prune(take_inventory(store), Rules()).memos]


def test_models_that_were_not_used_for_long_go(store, tmp_path):
    use(store, tmp_path / "a", 40)
    use(store, tmp_path / "c", 31)
    plan = plan_prune(take_inventory(store), Rules(older_than=30 * DAY))
    assert names(plan) == ["a", "c"]
    assert len(plan.entries) == 3  # c's; a's are b's too
    assert names(plan_prune(take_inventory(store), Rules(older_than=35 * DAY))) == ["a"]


def test_the_least_recently_used_go_until_the_rest_fits(store, tmp_path):
    for days, name in enumerate(("c", "b", "a"), 1):
        use(store, tmp_path / name, days)
    inventory = take_inventory(store)
    assert names(plan_prune(inventory, Rules(max_size=inventory.size))) == []
    assert names(plan_prune(inventory, Rules(max_size=inventory.size - 1))) == ["a"]
    plan = plan_prune(inventory, Rules(max_size=inventory.size // 2))
    assert names(plan) == ["a", "b"]  # a alone frees only its manifest: its entries are b's too
    assert len(plan.entries) == 3
    assert inventory.size - plan.freed <= inventory.size // 2
    assert names(plan_prune(inventory, Rules(max_size=0))) == ["a", "b", "c"]


def test_the_last_use_of_a_model_is_its_last_conversion_or_load(store, tmp_path):
    for name in ("a", "b", "c"):
        use(store, tmp_path / name, 40)
    convert_checkpoint(tmp_path / "c")  # converts nothing: a load does the same
    assert names(plan_prune(take_inventory(store), Rules(older_than=30 * DAY))) == ["a", "b"]


def test_what_is_to_be_kept_is_kept_and_said(store, tmp_path):
    keep = frozenset({model_id(tmp_path / "a")})
    plan = plan_prune(take_inventory(store), Rules(max_size=0, keep=keep))
    assert names(plan) == ["b", "c"]
    assert (str(tmp_path / "a"), "--keep") in plan.kept
    assert any("more than --max-size" in why for _, why in plan.kept)


@pytest.mark.parametrize("rules", [Rules(max_size=0), Rules(older_than=0.0), Rules(orphans=True)])
def test_the_only_copy_is_never_pruned_but_can_be_removed(store, tmp_path, rules):
    mark_dropped(store, tmp_path / "c")
    use(store, tmp_path / "c", 1)
    shutil.rmtree(tmp_path / "c")
    plan = plan_prune(later(store), rules)
    assert "c" not in names(plan)
    assert any("only copy" in why for _, why in plan.kept)
    inventory = take_inventory(store)
    assert len(plan_removal(inventory, pick(inventory, "c")).entries) == 3


def test_orphans_go_only_when_asked_for(store, tmp_path):
    shutil.rmtree(tmp_path / "c")  # perhaps a disk that is not mounted now
    assert plan_prune(later(store), Rules()).is_empty
    plan = plan_prune(later(store), Rules(orphans=True))
    assert names(plan) == ["c"]
    assert len(plan.entries) == 3
    assert plan.unclaimed == frozenset()


def test_unclaimed_entries_go_when_asked_for_and_an_hour_old(store, tmp_path):
    manifest_path(store, tmp_path / "c").unlink()
    assert plan_prune(later(store), Rules()).entries == {}
    young = plan_prune(take_inventory(store), Rules(orphans=True))
    assert (young.entries, young.kept) == ({}, (("3 unclaimed entries", "less than an hour old"),))
    old = plan_prune(later(store), Rules(orphans=True))
    assert len(old.entries) == len(old.unclaimed) == 3
    assert old.kept == ()


def test_an_old_mtime_does_not_make_an_unclaimed_entry_old(store, tmp_path):
    manifest_path(store, tmp_path / "c").unlink()
    inventory = take_inventory(store)
    for file in inventory.unclaimed.values():
        os.utime(file.path, (0, 0))
    assert plan_prune(take_inventory(store), Rules(orphans=True)).entries == {}


def test_while_a_conversion_runs_only_temps_are_removed(store, tmp_path):
    temp = store.folder("tmp") / temp_of(4194305)
    temp.write_bytes(b"1234")
    manifest_path(store, tmp_path / "c").unlink()
    with store.lock("another"):
        plan = plan_prune(later(store), Rules(max_size=0, orphans=True))
        with pytest.raises(StoreError, match="a conversion is running"):
            plan_removal(take_inventory(store), [])
    assert (plan.models, plan.entries, plan.memos, len(plan.dead_temps)) == ((), {}, (), 1)
    assert "a conversion is running" in plan.kept[0][1]


def test_where_locks_do_nothing_unclaimed_entries_stay(store, tmp_path, monkeypatch):
    manifest_path(store, tmp_path / "c").unlink()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    plan = plan_prune(later(store), Rules(orphans=True))
    assert plan.entries == {}
    assert "locks do nothing" in plan.kept[0][1]


def newer(store: Store, directory: Path) -> None:
    """Makes the model's manifest one of the next major version."""
    path = manifest_path(store, directory)
    data = bytearray(path.read_bytes())
    data[10:12] = (3).to_bytes(2, "little")
    path.write_bytes(data)


def test_beside_a_newer_manifest_no_entry_goes(store, tmp_path):
    newer(store, tmp_path / "b")
    inventory = later(store)
    with pytest.raises(StoreError, match="newer version"):
        plan_removal(inventory, pick(inventory, "c"))
    with pytest.raises(StoreError, match="newer version"):
        plan_removal(inventory, [model for model in inventory.models if model.newer])
    manifest_path(store, tmp_path / "c").unlink()
    plan = plan_prune(later(store), Rules(orphans=True))
    assert plan.is_empty
    assert "newer version" in plan.kept[0][1]


def test_foreign_directories_go_only_when_asked_for(store):
    directory = store.root / "0123456789abcdef"
    directory.mkdir()
    (directory / "converted_mlx.safetensors").write_bytes(b"123")
    assert plan_prune(later(store), Rules(max_size=10**9)).foreign == ()
    plan = plan_prune(later(store), Rules(foreign=True))
    assert ([f.path for f in plan.foreign], plan.freed) == ([directory], 3)


def test_kept_headers_go_with_the_model_that_names_them(store, tmp_path):
    headers = store.folder("headers")
    headers.mkdir()
    mark_dropped(store, tmp_path / "c")
    sources = [
        r.source_sha256 for m in take_inventory(store).models for r in m.records if r.dropped
    ]
    for name in (*sources, "0" * 64):
        (headers / name).write_bytes(b"12")
    inventory = take_inventory(store)
    plan = plan_removal(inventory, pick(inventory, "c"))
    assert {file.path.name for file in plan.headers} == set(sources)
    assert plan_prune(inventory, Rules()).headers == ()  # less than an hour old
    assert [f.path.name for f in plan_prune(later(store), Rules()).headers] == ["0" * 64]
