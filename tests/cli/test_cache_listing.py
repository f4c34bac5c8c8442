"""How a store's content is shown: a table, JSON, a footer; names from the disk made safe."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.cli.cache_listing import (
    as_json,
    footer,
    foreign_table,
    plan_json,
    plan_lines,
    size_json,
    size_lines,
    table,
)
from paroquant_stream.maintenance.inventory import Inventory, take_inventory
from paroquant_stream.maintenance.listing import make_row
from paroquant_stream.maintenance.prune import Rules, plan_prune, plan_removal
from paroquant_stream.store.manifest import Manifest
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import cut_evenly, temp_of, write_checkpoint

pytestmark = pytest.mark.usefixtures("settled")


def shown_now(verbose: bool = False, width: int | None = None) -> list[str]:
    inventory = take_inventory(cache_store())
    return table(rows(inventory), verbose, width)


def rows(inventory: Inventory):
    return [make_row(inventory, model) for model in inventory.models]


def manifest_file() -> Path:
    (path,) = cache_store().folder("manifests").iterdir()
    return path


@pytest.fixture
def converted(model_dir) -> Path:
    convert_checkpoint(model_dir, jobs=1)
    return model_dir


def test_a_model_is_one_aligned_line(converted):
    head, line = shown_now()
    assert head.split() == ["MODEL", "LAYOUT", "SHARDS", "SIZE", "LAST", "USED", "STATE"]
    assert line.split()[:3] == [str(converted), "AUTOAWQ", "3/3"]
    assert line.endswith("just now   fresh")
    assert line.index("fresh") == head.index("STATE")
    assert not any(end in line for end in ("\x1b", "\t"))


def test_verbose_shows_each_shard_and_why(converted):
    (converted / "model-00002-of-00003.safetensors").touch()
    lines = shown_now(verbose=True)
    assert "not read since it was written or moved (1)" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert lines[2].endswith("fresh: unchanged")
    assert lines[3].endswith("unknown: not read since it was written or moved")


def test_lines_are_cut_to_a_width_where_it_hurts_least(converted):
    shutil.rmtree(converted)
    whole = shown_now(verbose=True)
    assert shown_now(verbose=True, width=max(map(len, whole))) == whole
    for width in (50, 60, 80, 120):
        head, line, shard, *_ = cut = shown_now(verbose=True, width=width)
        assert max(map(len, cut)) <= width
        assert head.split()[0] == "MODEL"
        assert head.split()[-1] == "STATE"
        name = line.split()[0]
        assert name.startswith("...")
        assert str(converted).endswith(name[3:])
        assert line.index("orphan") == head.index("STATE")
        assert line.endswith("...")
        assert shard.startswith("  ")
        assert ("00001-of-00003.safetensors" in shard) == (width > 50)
    assert "LAYOUT" not in shown_now(width=80)[0]
    assert "LAYOUT" in shown_now(width=120)[0]


def test_a_terminal_too_narrow_for_anything_still_gets_lines(converted):
    assert len(shown_now(verbose=True, width=1)) == 5


def test_the_other_cache_is_cut_at_the_names_start():
    path = cache_store().root / "0123456789abcdef"
    path.mkdir(parents=True)
    (path / "converted_mlx.safetensors").write_bytes(b"123")
    line = foreign_table(take_inventory(cache_store()), width=50)[-1]
    assert line.startswith("...")
    assert line.endswith("/0123456789abcdef   3 B  just now")
    assert len(line) <= 50


def test_the_size_is_that_of_all_files_and_says_what_could_go(converted):
    store = cache_store()
    for _ in range(2):
        sizes = size_json(take_inventory(store))
        files = [path for path in store.root.rglob("*") if path.is_file()]
        small = sum(p.stat().st_size for p in files if p.parent.name == "memo")
        everything = sum(path.stat().st_size for path in files)
        assert everything - small - 200 < sizes["size"] <= everything  # locks and CACHEDIR.TAG
        (store.root / "0123456789abcdef").mkdir(exist_ok=True)
        (store.root / "0123456789abcdef" / "converted_mlx.safetensors").write_bytes(b"123")
        (store.folder("tmp") / temp_of(4194305)).write_bytes(b"12")
    assert (sizes["removable"], sizes["useless"], sizes["foreign"]) == (5, 2, 3)
    assert sizes["orphans"] == 0
    shutil.rmtree(converted)
    orphaned = size_json(take_inventory(store))
    assert orphaned["removable"] - 5 == orphaned["orphans"] > 100_000
    lines = size_lines(orphaned)
    assert lines[0].endswith(f"total in {store.root}")
    assert [line.split()[:2] for line in lines[2:5:2]] == [["2", "B"], ["3", "B"]]


def test_what_only_rm_removes_does_not_count_as_removable(converted):
    path = manifest_file()
    manifest = Manifest.decode(path.read_bytes())
    records = tuple(replace(record, dropped=True) for record in manifest.entries)
    path.write_bytes(replace(manifest, entries=records).encode())
    shutil.rmtree(converted)
    sizes = size_json(take_inventory(cache_store()))
    assert sizes["removable"] == 0
    assert size_lines(sizes)[-1].startswith(f"stays: {converted}: its source shards")


def test_a_model_that_is_gone_says_where_it_was(converted):
    shutil.rmtree(converted)
    assert shown_now()[1].endswith(f"orphan: {converted} is gone")
    next(cache_store().folder("entries").rglob("*.safetensors")).unlink()
    line, *shards = shown_now(verbose=True)[1:]
    assert " 2/3 " in line
    assert sum("stale: its entry is absent or damaged" in shard for shard in shards) == 1


def test_manifests_that_say_little_are_listed_with_what_is_known(converted):
    path = manifest_file()
    good = path.read_bytes()
    os.truncate(path, 60)
    assert shown_now()[1].startswith(f"({path.name[:12]})")
    assert "damaged: the next conversion replaces it" in shown_now()[1]
    data = bytearray(good)
    data[10:12] = (3).to_bytes(2, "little")
    path.write_bytes(data)
    assert "unknown: of a newer version, or not readable" in shown_now()[1]
    path.write_bytes(replace(Manifest.decode(good), directory="/elsewhere", model="x").encode())
    assert "did not record where the model lies" in shown_now()[1]
    path.rename(path.with_name(f"{path.stem}.dropped.msgpack"))
    assert "with --drop-source was interrupted" in shown_now()[1]


def test_names_from_the_disk_reach_the_terminal_escaped(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path / "evil\x1b[31m\nname\udcff", cut=cut_evenly(2)))
    text = "\n".join(shown_now(verbose=True))
    assert "\x1b" not in text
    assert "evil\\x1b[31m\\nname" in text
    assert text.count("\n") == 3
    text.encode()
    inventory = take_inventory(cache_store())
    json.dumps(as_json(inventory, rows(inventory))).encode()


def test_json_has_the_documented_fields(converted):
    inventory = take_inventory(cache_store())
    (model,) = as_json(inventory, rows(inventory))
    assert model.keys() == {
        "kind", "name", "directory", "manifest", "layout", "size", "last_used", "state", "why",
        "shards_converted", "shards",
    }  # fmt: skip
    assert (model["kind"], model["name"], model["state"]) == ("model", str(converted), "fresh")
    assert (model["layout"], model["shards_converted"], model["why"]) == ("AUTOAWQ", 3, "")
    assert abs(model["last_used"] - manifest_file().stat().st_mtime) < 1
    assert model["size"] == sum(shard["bytes_out"] for shard in model["shards"])
    for shard in model["shards"]:
        assert shard.keys() == {"shard", "state", "why", "key", "bytes_in", "bytes_out", "dropped"}
        assert shard["bytes_in"] == (converted / shard["shard"]).stat().st_size


def test_the_footer_counts_what_is_shared_and_what_could_go(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy")
    convert_checkpoint(tmp_path / "copy", jobs=1)
    store = cache_store()
    assert footer(take_inventory(store))[1].startswith("2 models, 3 entries, ")
    assert "3 entries shared by models (" in footer(take_inventory(store))[2]
    for path in store.folder("manifests").iterdir():
        path.unlink()
    (store.folder("tmp") / temp_of(4194305)).write_bytes(b"12")
    (store.root / "0123456789abcdef").mkdir()
    (store.root / "0123456789abcdef" / "converted_mlx.safetensors").write_bytes(b"123")
    inventory = take_inventory(store)
    text = "\n".join(footer(inventory))
    assert "0 models, 3 entries" in text
    assert "3 unclaimed entries (" in text
    assert "1 file of dead runs" in text
    assert "1 directory of paroquant's own cache (3 B): `prune --foreign`" in text
    kinds = [item["kind"] for item in as_json(inventory, [])]
    assert kinds == ["paroquant", "unclaimed", "temps"]
    assert foreign_table(inventory)[-1].split()[1:3] == ["3", "B"]


def test_a_plan_shows_removed_shared_and_only_copies(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy")
    convert_checkpoint(tmp_path / "copy", jobs=1)
    inventory = take_inventory(cache_store())
    plan = plan_removal(inventory, inventory.models[:1])
    (line,) = plan_lines(plan)
    assert line.startswith(f"  {tmp_path / 'copy'}  0 B, ")
    assert line.endswith("shared with others stay")
    assert plan_json(plan, True)["models"] == [str(tmp_path / "copy")]
    path = inventory.models[0].files[0].path
    manifest = Manifest.decode(path.read_bytes())
    records = tuple(replace(record, dropped=True) for record in manifest.entries)
    path.write_bytes(replace(manifest, entries=records).encode())
    inventory = take_inventory(cache_store())
    assert "THIS IS THE ONLY COPY" in plan_lines(plan_removal(inventory, inventory.models[:1]))[0]
    plan = plan_prune(inventory, Rules(max_size=0))
    assert plan_lines(plan)[1].startswith(f"stays: {tmp_path / 'copy'}: its source shards")
    assert plan_json(plan, False)["stays"][0]["what"] == str(tmp_path / "copy")
