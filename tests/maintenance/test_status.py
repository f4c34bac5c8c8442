"""Whether a model is still up to date, found without reading it, in the words of a dry run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import replace

import pytest

from paroquant_stream.checkpoint.shard import Shard
from paroquant_stream.cli import convert as command
from paroquant_stream.conversion import staleness
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request, read_manifest
from paroquant_stream.errors import CheckpointError
from paroquant_stream.files.hashing import SourceHasher
from paroquant_stream.maintenance.status import (
    BROKEN,
    FRESH,
    NOT_REMEMBERED,
    STALE,
    UNKNOWN,
    Freshness,
    examine,
)
from paroquant_stream.store.format import OPERATION_VERSIONS
from tests.helpers.builders import (
    as_hub_snapshot,
    cut_evenly,
    flip,
    llama_tensors,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("settled")
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def look(directory) -> Freshness:
    """The freshness, found without a byte of any shard being read."""
    made = make_request(directory, jobs=1)
    manifest = read_manifest(made)

    def refuse(*_):
        raise AssertionError("a shard was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceHasher, "advance", refuse)
        return examine(made, manifest)


def whys(found: Freshness) -> list[tuple[str, str]]:
    return [(shard.state, shard.why) for shard in found.shards]


def dry_run(directory) -> list[str]:
    """The reasons that `convert --dry-run` gives, shard by shard."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command.main([str(directory), "--dry-run", "--json"]) == 0
    return [shard["why"] for shard in json.loads(out.getvalue())["shards"]]


def read_through(directory) -> None:
    """Remembers the digests of all shards, as a hash of them does."""
    memo = make_request(directory).store.digest_cache
    for path in directory.glob("model*.safetensors"):
        Shard(path.name, path).sha256(memo)


def change(directory, name: str = SECOND) -> None:
    """Changes one byte of a tensor that no other shard borrows."""
    tensors = Shard(name, directory / name).header().tensors
    found = next(t for t in tensors if t.name.endswith(("theta", "norm.weight")))
    with (directory / name).open("r+b") as file:
        file.seek(found.start)
        byte = file.read(1)[0]
        file.seek(found.start)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def converted(model_dir):
    convert(make_request(model_dir, jobs=1))
    return model_dir


def test_an_unchanged_model_is_fresh(converted):
    found = look(converted)
    assert (found.state, found.why) == (FRESH, "")
    assert whys(found) == [(FRESH, "unchanged")] * 3
    assert all(shard.is_converted for shard in found.shards)
    assert dry_run(converted) == ["unchanged"] * 3


def test_content_that_changed_is_told_in_the_words_of_a_dry_run(converted):
    change(converted)
    read_through(converted)
    found = look(converted)
    assert (found.state, found.why) == (STALE, "content changed (1)")
    assert [shard.why for shard in found.shards] == dry_run(converted)
    assert [shard.is_converted for shard in found.shards] == [True, False, True]


def test_another_size_is_a_change_that_needs_no_digest(converted):
    tensors = llama_tensors() | {"model.extra.weight": llama_tensors()["model.norm.weight"]}
    write_checkpoint(converted, tensors, cut_evenly(3))
    found = look(converted)
    assert found.state == STALE
    assert ("stale", "content changed") in whys(found)


def test_a_shard_never_hashed_here_is_unknown(converted):
    shutil.copy(converted / SECOND, converted / "copy")
    os.replace(converted / "copy", converted / SECOND)
    found = look(converted)
    assert (found.state, found.why) == (UNKNOWN, "not read since it was written or moved (1)")
    assert all(shard.is_converted for shard in found.shards)
    assert dry_run(converted) == ["unchanged"] * 3


def test_the_name_of_a_blob_alone_tells_nothing(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy")
    snapshot = as_hub_snapshot(tmp_path / "copy", tmp_path / "models--owner--name")
    convert(make_request(snapshot, jobs=1))
    assert look(snapshot).state == FRESH
    flip((snapshot / SECOND).resolve(), -1 + (snapshot / SECOND).stat().st_size)
    assert whys(look(snapshot))[1] == (UNKNOWN, "not read since it was written or moved")


def test_a_shard_that_goes_meanwhile_is_unknown(converted, monkeypatch):
    def gone(*_):
        raise CheckpointError("the shard is absent")

    monkeypatch.setattr(Shard, "known_sha256", gone)
    (converted / "config.json").write_text((converted / "config.json").read_text() + " ")
    assert {state for state, _ in whys(look(converted))} == {UNKNOWN}


def test_an_absent_entry_is_reported_for_an_unhashed_shard(converted):
    made = make_request(converted)
    record = read_manifest(made).entries[1]
    made.store.entry_path(record.key).unlink()
    expected = [
        (FRESH, "unchanged"),
        (STALE, "its entry is absent or damaged"),
        (FRESH, "unchanged"),
    ]
    assert whys(look(converted)) == expected
    assert dry_run(converted) == [why for _, why in expected]
    shutil.copy(converted / SECOND, converted / "copy")
    os.replace(converted / "copy", converted / SECOND)
    assert whys(look(converted)) == expected


def test_an_entry_cut_short_is_told(converted):
    made = make_request(converted)
    record = read_manifest(made).entries[1]
    os.truncate(made.store.entry_path(record.key), record.size - 1)
    assert whys(look(converted))[1] == (STALE, "its entry is absent or damaged")


def test_a_new_shard_was_never_converted(converted):
    tensors = llama_tensors()
    write_checkpoint(converted, tensors, cut_evenly(4))
    read_through(converted)
    assert [shard.why for shard in look(converted).shards] == dry_run(converted)
    assert {why for _, why in whys(look(converted))} == {"never converted"}


def test_another_version_of_an_operation_makes_its_entries_stale(converted, monkeypatch):
    monkeypatch.setitem(OPERATION_VERSIONS, "quantize", 2)
    monkeypatch.setattr(staleness, "TRANSFORM", "another")
    found = look(converted)
    assert found.state == STALE
    assert "config, tensors of its linears or transform version changed" in found.why
    assert [shard.why for shard in found.shards] == dry_run(converted)


def test_a_config_that_changes_no_entry_keeps_every_shard(converted):
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"note": 1}))
    found = look(converted)
    assert (found.state, found.why) == (STALE, "config.json or the index changed")
    assert whys(found) == [(FRESH, "unchanged")] * 3
    assert dry_run(converted) == ["unchanged"] * 3


def test_a_changed_lender_may_have_changed_borrowed_parts(scattered_dir):
    convert(make_request(scattered_dir, jobs=1))
    change(scattered_dir, FIRST)
    read_through(scattered_dir)
    states = whys(look(scattered_dir))
    found = dry_run(scattered_dir)
    assert states[0][1] == found[0] == "content changed"
    assert (UNKNOWN, "perhaps borrowed part changed") in states
    assert all(
        found[i] in ("unchanged", "borrowed part changed")
        for i, (state, _) in enumerate(states)
        if state == UNKNOWN
    )


def test_content_whose_entry_is_there_already_would_be_reused(converted, tmp_path):
    change(converted)
    shutil.copytree(converted, tmp_path / "copy")
    convert(make_request(tmp_path / "copy", jobs=1))
    read_through(converted)
    assert [shard.why for shard in look(converted).shards] == dry_run(converted)
    assert "its content is in the cache already" in dry_run(converted)


def test_a_dropped_shard_is_fresh_while_its_entry_is_there(converted):
    made = make_request(converted)
    manifest = read_manifest(made)
    records = tuple(replace(record, dropped=True) for record in manifest.entries)
    made.store.write_manifest(made.manifest_name, replace(manifest, entries=records))
    (converted / SECOND).unlink()
    found = look(converted)
    assert found.state == FRESH
    assert [shard.dropped for shard in found.shards] == [True] * 3


def test_a_model_that_cannot_be_read_is_broken_and_says_why(converted):
    os.truncate(converted / SECOND, 100)
    found = look(converted)
    assert found.state == BROKEN
    assert SECOND in found.why
    assert [shard.why for shard in found.shards] == ["see its model"] * 3
    (converted / "config.json").unlink()
    assert "config.json" in look(converted).why


def test_a_shard_that_was_new_when_it_was_converted_says_so(converted):
    for memo in make_request(converted).store.folder("memo").iterdir():
        memo.unlink()  # as of files that were younger than 2 s: none was stored
    found = look(converted)
    assert (found.state, found.why) == (UNKNOWN, f"{NOT_REMEMBERED} (3)")
    os.utime(converted / FIRST)
    assert whys(look(converted)) == [
        (UNKNOWN, "not read since it was written or moved"),
        (UNKNOWN, NOT_REMEMBERED),
        (UNKNOWN, NOT_REMEMBERED),
    ]
