"""The cache in Python: each removal and repair is a value first, and executed when asked to."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta

import pytest

from paroquant_stream import (
    StoreError,
    convert_checkpoint,
    list_cache,
    plan_prune,
    plan_removal,
    verify_cache,
)
from paroquant_stream.conversion.request import model_id
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import temp_of

pytestmark = pytest.mark.usefixtures("settled")


def bytes_on_disk() -> int:
    files = [path for path in cache_store().root.rglob("*") if path.parent.name != "memo"]
    kinds = (".safetensors", ".msgpack", ".digest")
    return sum(path.stat().st_size for path in files if path.suffix in kinds)


def listed() -> list[str]:
    return [model.name for model in list_cache().models]


def test_a_listed_model_says_what_a_load_would_do(model_dir, tmp_path):
    assert list_cache().models == ()
    convert_checkpoint(model_dir, dtype="float16")
    (model,) = list_cache(model_dir).models
    assert (model.name, model.directory) == (f"{model_dir} (float16)", model_dir)
    assert (model.dtype, model.layout, model.only_copy) == ("float16", "AUTOAWQ", False)
    assert (model.state, model.why, len(model.shards)) == ("fresh", "", 3)
    assert model.size == sum(shard.bytes_out for shard in model.shards) < list_cache().size
    shutil.rmtree(model_dir)
    (model,) = list_cache().models
    assert (model.state, model.why) == ("orphan", f"{model_dir} is gone")


def test_a_model_that_is_not_in_the_cache_is_an_error(model_dir, tmp_path):
    convert_checkpoint(model_dir)
    for call in (list_cache, plan_removal, lambda name: plan_prune(keep=[name])):
        with pytest.raises(StoreError, match="absent: not converted in"):
            call(tmp_path / "absent")
    with pytest.raises(StoreError, match=f"not converted in {tmp_path / 'other'}"):
        plan_removal(model_dir, cache_dir=tmp_path / "other")


def test_a_plan_removes_nothing_until_it_is_executed(three):
    before, plan = bytes_on_disk(), plan_removal(three[2])
    assert [(r.what, r.why) for r in plan.removals] == [(str(three[2]), "asked for")]
    assert plan.size == plan.removals[0].size > 0
    assert all(path.exists() for path in plan.removals[0].files)
    assert bytes_on_disk() == before
    assert plan.execute() == plan.size == before - bytes_on_disk()
    assert not any(path.exists() for path in plan.removals[0].files)
    assert plan.execute() == 0
    assert listed() == [str(path) for path in three[:2]]


def test_a_shared_entry_is_in_one_removal_of_a_plan(three):
    alone, both = plan_removal(three[0]), plan_removal(*three[:2])
    assert len(alone.removals[0].files) == 1  # the manifest: its entries are b's too
    files = [path for removal in both.removals for path in removal.files]
    assert len(files) == len(set(files)) > 2
    assert both.size == sum(removal.size for removal in both.removals)


def test_a_model_that_is_used_after_the_plan_stays(three):
    plan = plan_removal(three[2])
    convert_checkpoint(three[2])
    plan.execute()
    assert str(three[2]) in listed()
    assert verify_cache(three[2]).problems == ()


def test_a_directory_names_every_dtype_and_a_listed_model_one(model_dir):
    for dtype in ("source", "float16"):
        convert_checkpoint(model_dir, dtype=dtype)
    names = [str(model_dir), f"{model_dir} (float16)"]
    assert [removal.what for removal in plan_removal(model_dir).removals] == names
    _, half = list_cache().models
    assert [removal.what for removal in plan_removal(half).removals] == names[1:]


def test_a_prune_says_why_each_model_goes_or_stays(three):
    a, b, c = three
    for path, days in ((a, 40.0), (b, 3.0)):
        manifest = cache_store().manifest_path(model_id(path))
        when = manifest.stat().st_mtime - days * 86_400
        os.utime(manifest, (when, when))
    shutil.rmtree(c)
    assert plan_prune().is_empty
    plan = plan_prune(older_than=timedelta(days=30), orphans=True)
    found = [(removal.what, removal.why) for removal in plan.removals]
    assert found == [(str(a), "last used 5 weeks ago"), (str(c), f"{c} is gone")]
    assert plan_prune(older_than=30 * 86_400.0, orphans=True).removals == plan.removals
    plan = plan_prune(max_size=list_cache().size - 1, keep=[a, c])
    assert [(r.what, r.why) for r in plan.removals] == [
        (str(b), "least recently used, and the cache is larger than allowed")
    ]
    assert {what for what, _ in plan.kept} == {str(a)}


def test_leftovers_are_removals_of_their_kind(three):
    store = cache_store()
    temp = store.folder("tmp") / temp_of(4194305)
    temp.write_bytes(b"1234")
    foreign = store.root / "0123456789abcdef"
    foreign.mkdir()
    (foreign / "converted_mlx.safetensors").write_bytes(b"123")
    os.truncate(store.manifest_path(model_id(three[2])), 10)
    plan = plan_prune(foreign=True)
    found = {removal.what: (removal.why, removal.size) for removal in plan.removals}
    assert found[str(foreign)] == ("of paroquant's own cache", 3)
    assert found["temporary files"] == ("their runs are dead", 4)
    assert ("its manifest is damaged, so no load uses it", 10) in found.values()
    assert plan.size == plan.execute() == 17


def test_one_name_to_keep_needs_no_list(model_dir):
    convert_checkpoint(model_dir)
    assert plan_prune(max_size=0, keep=str(model_dir)).is_empty


@pytest.mark.parametrize("rule", [{"max_size": -1}, {"older_than": timedelta(days=-1)}])
def test_a_negative_rule_is_refused(rule):
    with pytest.raises(ValueError, match="0 or more"):
        plan_prune(**rule)


def test_a_running_conversion_is_seen_by_the_plan_and_its_execution(model_dir):
    convert_checkpoint(model_dir)
    plan = plan_removal(model_dir)
    with cache_store().lock("another"):
        for call in (plan.execute, lambda: plan_removal(model_dir)):
            with pytest.raises(StoreError, match="a conversion is running"):
                call()
    assert listed() == [str(model_dir)]
