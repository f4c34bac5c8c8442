"""Sources that are removed once their entries are safe: nothing is ever lost by it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from paroquant_stream.api.load import load
from paroquant_stream.conversion import drop_source as drop
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.in_place import shipped
from paroquant_stream.conversion.planning import plan_model, survey
from paroquant_stream.conversion.request import make_request, read_manifest
from paroquant_stream.errors import (
    AssemblyError,
    EntryDamagedError,
    MissingExtraError,
    OutOfRangeError,
    ParoquantStreamError,
    SourceChangedError,
    SourceDroppedError,
    StoreError,
)
from paroquant_stream.files import descriptor
from paroquant_stream.files.folder import Folder
from paroquant_stream.files.temp_files import is_temp, temp_name
from paroquant_stream.store import drop_note, lock
from paroquant_stream.store.drop_note import NOTE, read_note
from paroquant_stream.store.drop_record import read_records, record_ids, write_record
from paroquant_stream.store.lock import directory_lock
from tests.helpers.builders import CONFIG, cut_apart, cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.processes import killed_at

FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def run(directory, **options):
    return convert(make_request(directory, jobs=1, **options))


def shards(directory) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def digests(result) -> list[str]:
    return [record.digest for record in result.manifest.entries]


@pytest.fixture
def whole(model_dir, tmp_path) -> list[str]:
    """The digests of the entries of a plain conversion."""
    return digests(run(model_dir, cache_dir=tmp_path / "whole"))


@pytest.mark.parametrize("in_place", [False, True])
def test_every_source_goes_and_the_model_still_loads(model_dir, whole, in_place, monkeypatch):
    result = run(model_dir, drop_source=True, in_place=in_place)
    assert shards(model_dir) == []
    assert digests(result) == whole
    assert all(record.dropped for record in result.manifest.entries)
    monkeypatch.setattr(
        "paroquant_stream.transform.task_runner.run_task", lambda *_: pytest.fail("converted")
    )
    load(model_dir)
    assert {r.action for r in run(model_dir, in_place=in_place).shards} == {"reused"}


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_parts_in_other_shards_keep_those_until_all_is_converted(scattered_dir, tmp_path, jobs):
    right = digests(run(scattered_dir, cache_dir=tmp_path / "whole"))
    result = convert(make_request(scattered_dir, jobs=jobs, drop_source=True))
    assert digests(result) == right
    assert shards(scattered_dir) == []


def test_a_shard_goes_before_the_last_one_is_converted(tmp_path):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(8))
    left = []
    request = make_request(directory, jobs=1, drop_source=True)
    convert(request, lambda shard, done, size: left.append(len(shards(directory))))
    assert 8 in left
    assert 4 in left


def test_a_model_that_was_converted_before_is_only_dropped(model_dir, whole):
    run(model_dir)
    result = run(model_dir, drop_source=True)
    assert {r.action for r in result.shards} == {"reused"}
    assert shards(model_dir) == []
    assert digests(result) == whole


def test_an_entry_that_reads_back_wrong_keeps_its_source(model_dir, monkeypatch):
    monkeypatch.setattr(drop, "confirmed_defect", lambda *_: "expected this, found that")
    with pytest.raises(EntryDamagedError, match="when it was read back; model-0000"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]


def test_an_entry_that_reads_back_wrong_once_is_no_damage(model_dir, whole, monkeypatch):
    real, answers = drop.confirmed_defect, ["expected this, found that"]
    monkeypatch.setattr(drop, "confirmed_defect", lambda *a: answers.pop() if answers else real(*a))
    assert digests(run(model_dir, drop_source=True)) == whole
    assert answers == shards(model_dir) == []


def test_an_entry_whose_lender_goes_is_read_back_before(scattered_dir, monkeypatch):
    events = []
    read_back, remove = drop.Dropper._read_back, drop.SourceFile.remove
    monkeypatch.setattr(
        drop.Dropper, "_read_back", lambda self, s: events.append(s) or read_back(self, s)
    )
    monkeypatch.setattr(
        drop.SourceFile, "remove", lambda self: events.append(self.path) or remove(self)
    )
    borrowed = {t.shard: t.borrowed for t in plan_model(make_request(scattered_dir)).plan.tasks}
    run(scattered_dir, drop_source=True)
    assert any(borrowed.values())
    for borrower, lenders in borrowed.items():
        for lender in lenders:
            assert events.index(borrower) < events.index(scattered_dir / lender)


def replace_by(path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def flip(path) -> None:
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"new"),
    "another file": lambda path: replace_by(path, bytes(path.stat().st_size)),
    "one byte in place, times restored": flip,
    "another name for it": lambda path: path.rename(path.with_suffix(".gone")),
}
MOMENTS = ("_read_back", "_source", "_check_lent", "_write_record")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_source_that_changes_before_it_goes_is_kept(scattered_dir, monkeypatch, moment, change):
    real, changed = getattr(drop.Dropper, moment), []
    run(scattered_dir)

    def first_change(self, *arguments):
        if not changed:
            changed.append(SECOND)
            CHANGES[change](scattered_dir / SECOND)
        return real(self, *arguments)

    monkeypatch.setattr(drop.Dropper, moment, first_change)
    with pytest.raises((SourceChangedError, StoreError)):
        run(scattered_dir, drop_source=True)
    left = {path.stat().st_ino for path in scattered_dir.iterdir()}
    assert changed
    kept = SECOND if change != "another name for it" else SECOND.replace(".safetensors", ".gone")
    assert (scattered_dir / kept).stat().st_ino in left
    assert len(list(scattered_dir.glob("model-*"))) >= 2


def test_a_lender_that_changed_after_lending_is_noticed(scattered_dir, monkeypatch):
    monkeypatch.setattr(drop.SourceFile, "lent_sha256", lambda *_: "0" * 64)
    with pytest.raises(SourceChangedError, match="borrowed from it changed"):
        run(scattered_dir, drop_source=True)
    assert shards(scattered_dir) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize("lender", [FIRST, THIRD])
def test_what_was_lent_is_read_again_before_either_goes(tmp_path, monkeypatch, lender):
    """The last shard that is converted goes first: once the borrower, once the lender."""
    borrower = THIRD if lender == FIRST else FIRST
    homes = {"qzeros": borrower, "scales": lender}

    def cut(names: list[str]) -> dict[str, str]:
        return {name: homes.get(name.rpartition(".")[2], SECOND) for name in names}

    directory = write_checkpoint(tmp_path / "m", cut=cut)
    monkeypatch.setattr(drop.SourceFile, "lent_sha256", lambda *_: "0" * 64)
    with pytest.raises(SourceChangedError, match=f"{lender}: what {borrower} borrowed"):
        run(directory, drop_source=True)
    assert {FIRST, THIRD} <= set(shards(directory))


def test_a_link_that_a_killed_drop_left_goes_with_the_next_drop(model_dir):
    run(model_dir, drop_source=True)
    (model_dir / SECOND).symlink_to("gone")
    assert {r.action for r in run(model_dir).shards} == {"reused"}
    assert shards(model_dir) == [SECOND]  # nothing is removed without being asked for
    assert {r.action for r in run(model_dir, drop_source=True).shards} == {"reused"}
    assert shards(model_dir) == []


@pytest.mark.parametrize("beside", [False, True])
def test_a_hub_model_gets_a_note_only_beside_an_older_tree(hub, tmp_path, beside):
    """A commit tells what it holds, but a conversion beside it may be of other shards."""
    hub.push("owner/name", write_checkpoint(tmp_path / "m", cut=cut_evenly(2)))
    if beside:
        run("owner/name", in_place=True)
    run("owner/name", drop_source=True)
    directory = make_request("owner/name").source.directory
    assert shards(directory) == []
    assert (directory / NOTE).exists() == beside


def test_beside_an_older_tree_a_drop_needs_its_note(model_dir, monkeypatch):
    """Without one the tree would be used, whatever it was made of."""
    run(model_dir, in_place=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drop_note, "new_file_in", full)
    with pytest.raises(StoreError, match=rf"{NOTE}: cannot be written: .*No space left"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]


def test_a_drop_in_place_replaces_the_note_of_one_into_the_cache(model_dir):
    run(model_dir, drop_source=True)
    noted = read_note(model_dir)
    write_checkpoint(model_dir, llama_tensors(1), cut_evenly(3))
    right = digests(run(model_dir, drop_source=True, in_place=True))
    store = make_request(model_dir, in_place=True).store
    assert record_ids(store) == [read_note(model_dir)] != [noted]
    manifest, _ = shipped(make_request(model_dir))
    assert [record.digest for record in manifest.entries] == right


def test_files_that_were_read_and_stay_are_closed(scattered_dir, monkeypatch):
    opened, closed = [], []
    begin, close = drop.SourceFile.__init__, drop.SourceFile.close

    def fail(self):
        raise StoreError("cannot be removed")

    monkeypatch.setattr(
        drop.SourceFile, "__init__", lambda self, *given: opened.append(self) or begin(self, *given)
    )
    monkeypatch.setattr(drop.SourceFile, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setattr(drop.SourceFile, "remove", fail)
    with pytest.raises(StoreError, match="cannot be removed"):
        run(scattered_dir, drop_source=True)
    assert len(opened) > 1
    assert set(map(id, opened)) == set(map(id, closed))


def test_a_last_record_that_cannot_be_written_fails_the_drop(model_dir, monkeypatch, caplog):
    real = drop.write_record

    def full(*given):
        if not shards(model_dir):
            raise StoreError("no space left")
        real(*given)

    monkeypatch.setattr(drop, "write_record", full)
    with pytest.raises(StoreError, match="no space left"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == []
    request = make_request(model_dir)
    request.store.manifest_path(request.manifest_name).unlink()
    next(request.store.folder("dropped").iterdir()).unlink()
    assert {r.action for r in run(model_dir).shards} == {"reused"}  # removes nothing: a warning
    assert "no space left" in caplog.text


def test_a_changed_config_says_that_the_source_was_removed(model_dir):
    run(model_dir, drop_source=True)
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"note": "no byte depends on it"}))
    assert {r.action for r in run(model_dir).shards} == {"reused"}
    store = make_request(model_dir).store
    store.entry_path(read_manifest(make_request(model_dir)).entries[1].key).unlink()
    with pytest.raises(SourceDroppedError, match=f"{SECOND}: its entry is absent") as error:
        run(model_dir)
    assert "put them back" in str(error.value)
    with pytest.raises(SourceDroppedError, match=f"{FIRST}: forced"):
        run(model_dir, force=True)
    with pytest.raises(SourceDroppedError):
        survey(make_request(model_dir))


def test_a_new_operation_version_names_the_removed_source(model_dir, monkeypatch):
    run(model_dir, drop_source=True)
    monkeypatch.setattr("paroquant_stream.conversion.staleness.TRANSFORM", "newer")
    assert {r.action for r in run(model_dir).shards} == {"reused"}
    monkeypatch.setitem(drop.Task.sha256.func.__globals__["OPERATION_VERSIONS"], "awq_weight", 99)
    with pytest.raises(SourceDroppedError, match="transform version changed"):
        run(model_dir)


def test_sources_that_come_back_are_sources_again(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "backup")
    run(model_dir, drop_source=True)
    shutil.copytree(tmp_path / "backup", model_dir, dirs_exist_ok=True)
    result = run(model_dir)
    assert {r.action for r in result.shards} == {"reused"}
    assert not any(record.dropped for record in result.manifest.entries)


def test_a_shard_that_returns_changed_is_not_completed(scattered_dir, tmp_path):
    backup = shutil.copytree(scattered_dir, tmp_path / "backup")
    run(scattered_dir, drop_source=True)
    shutil.copy(backup / THIRD, scattered_dir / THIRD)
    flip(scattered_dir / THIRD)
    with pytest.raises(
        SourceDroppedError, match=f"{THIRD}: expected SHA-256 .*put back all shards"
    ):
        run(scattered_dir)
    shutil.copy(backup / THIRD, scattered_dir / THIRD)
    assert {r.action for r in run(scattered_dir).shards} == {"reused"}


def test_an_unwritable_directory_is_reported_and_nothing_is_lost(model_dir, whole, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(StoreError, match=f"{FIRST}: cannot be removed: Permission denied"):
            run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]
    assert digests(run(model_dir, drop_source=True)) == whole


def test_less_free_space_than_the_whole_conversion_is_enough(model_dir, monkeypatch):
    needed = sum(r.size for r in run(model_dir, cache_dir=model_dir / "x").manifest.entries)
    monkeypatch.setattr("paroquant_stream.store.store.Store.free_bytes", lambda _: needed // 2)
    with pytest.raises(StoreError, match=" needed for "):
        run(model_dir)
    run(model_dir, drop_source=True)


class Killed(BaseException):
    pass


@pytest.fixture(params=[pytest.param("in a row", marks=pytest.mark.slow), "apart", "by type"])
def lending_dir(request, tmp_path):
    """A model whose shards lend to each other: to the next one, to all, to one that has all."""
    cuts = {"in a row": cut_evenly(3), "apart": cut_apart(3), "by type": cut_by_type}
    return write_checkpoint(tmp_path / "lending", cut=cuts[request.param])


def cut_by_type(names: list[str]) -> dict[str, str]:
    """Every qzeros in the first shard, every scales in the last: each lends to another."""
    homes = {"qzeros": FIRST, "scales": THIRD}
    return {name: homes.get(name.rpartition(".")[2], SECOND) for name in names}


STRIDE = pytest.mark.parametrize(
    "stride",
    [13, pytest.param(7, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)],
)


@STRIDE
@pytest.mark.parametrize("converted", [False, True])
def test_interrupted_at_any_change_the_next_run_completes(
    lending_dir, tmp_path, monkeypatch, converted, stride
):
    """Every `stride`-th rename, unlink and fsync is the last thing that a run does."""
    right = digests(run(lending_dir, cache_dir=tmp_path / "right"))
    step, cut = 0, 0
    while True:
        step += stride
        directory, cache = tmp_path / f"model{step}", tmp_path / f"cache{step}"
        shutil.copytree(lending_dir, directory)
        if converted:  # by an earlier run, so that there is a manifest that drops nothing
            run(directory, cache_dir=cache)
        calls = 0

        def deadly(real, step=step):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls >= step:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "fsync"):
                patch.setattr(os, name, deadly(getattr(os, name)))
            try:
                run(directory, cache_dir=cache, drop_source=True)
            except Killed:
                cut += 1
            else:
                break
        assert digests(run(directory, cache_dir=cache)) == right  # also without the option
        assert digests(run(directory, cache_dir=cache, drop_source=True)) == right
        assert shards(directory) == []
        shutil.rmtree(directory)
        shutil.rmtree(cache)
    assert cut > 30 // stride


KILL = killed_at("replace", "unlink")


@pytest.mark.parametrize("steps", [(9,), pytest.param(range(1, 40), marks=pytest.mark.long)])
def test_killed_while_it_drops_the_next_run_completes(model_dir, whole, tmp_path, steps):
    killed = 0
    for step in steps:
        directory, cache = tmp_path / f"model{step}", tmp_path / f"cache{step}"
        shutil.copytree(model_dir, directory)
        arguments = [str(directory), "--cache-dir", str(cache), "--jobs", "1", "--drop-source"]
        done = subprocess.run([sys.executable, "-c", KILL, str(step), *arguments, "-y"])
        killed += done.returncode == -signal.SIGKILL
        assert digests(run(directory, cache_dir=cache, drop_source=True)) == whole
        assert shards(directory) == []
        assert not list((cache / "v1" / "tmp").iterdir())
    assert killed >= min(len(steps), 12)


def test_before_a_removal_the_record_names_every_related_shard(scattered_dir, monkeypatch):
    request = make_request(scattered_dir, jobs=1, drop_source=True)
    real, seen = drop.SourceFile.remove, []

    def look(self):
        (record,) = read_records(request.store)
        named = {entry.shard: entry.dropped for entry in record.manifest.entries}
        seen.append((named, record.headers.keys()))
        real(self)

    monkeypatch.setattr(drop.SourceFile, "remove", look)
    convert(request)
    assert [named.keys() for named, _ in seen] == [{FIRST, SECOND, THIRD}] * 3
    for named, headers in seen:
        assert {shard for shard, dropped in named.items() if dropped} == headers
    assert [len(headers) for _, headers in seen] == [1, 2, 3]


def test_a_record_that_misstates_lenders_is_not_trusted(scattered_dir):
    run(scattered_dir, drop_source=True)
    request = make_request(scattered_dir)
    (record,) = read_records(request.store)
    entries = tuple(replace(entry, borrowed_sha256=()) for entry in record.manifest.entries)
    write_record(request.store, replace(record, manifest=replace(record.manifest, entries=entries)))
    (scattered_dir / "config.json").write_text(json.dumps(CONFIG | {"note": 1}))
    with pytest.raises(SourceDroppedError, match="a part that it borrows changed"):
        run(scattered_dir)


def test_with_a_cast_no_shard_is_removed_before_the_end(tmp_path, monkeypatch):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["model.norm.weight"][0] = 1e6  # no float16
    directory = write_checkpoint(tmp_path / "m", tensors, cut_evenly(4))
    with pytest.raises(OutOfRangeError):
        run(directory, drop_source=True, dtype="float16")
    assert len(shards(directory)) == 4
    left, remove = [], drop.SourceFile.remove
    monkeypatch.setattr(
        drop.SourceFile, "remove", lambda self: left.append(len(shards(directory))) or remove(self)
    )
    request = make_request(directory, jobs=1, drop_source=True, dtype="bfloat16")
    convert(request)
    assert left == [4, 3, 2, 1]
    assert len(read_manifest(request).entries) == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "nosuch"}, "nosuch"),
        ({"num_hidden_layers": 3}, r"layers\.2\..*no stored tensor"),
        ({"intermediate_size": 256}, "the model has"),
    ],
)
def test_what_could_not_be_loaded_is_not_dropped(model_dir, config, words):
    (model_dir / "config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(AssemblyError, match=words):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]
    assert not list(model_dir.parent.glob("user-cache/v1/entries/*/*"))


def test_without_mlx_lm_nothing_is_dropped(model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(MissingExtraError, match="pip install mlx-lm"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize("where", ["model", "cache"])
def test_where_locks_do_nothing_a_drop_is_refused(model_dir, monkeypatch, where):
    if where == "model":
        monkeypatch.setattr("fcntl.flock", lambda *_: None)
    else:
        monkeypatch.setattr("paroquant_stream.store.store.Store.locks_work", lambda _: False)
    with pytest.raises(StoreError, match="locks do nothing on this file system"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]
    run(model_dir)


def test_a_drop_waits_for_every_other_run_of_the_model(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0.2)
    with directory_lock(partial(Folder.open, model_dir), exclusive=False, required=False):
        run(model_dir, cache_dir=tmp_path / "other")  # a conversion that removes nothing does not
        with pytest.raises(StoreError, match="another conversion of this model held its lock"):
            run(model_dir, drop_source=True)
    (tmp_path / "link").symlink_to(model_dir)
    with directory_lock(partial(Folder.open, tmp_path / "link"), exclusive=True, required=True):
        with pytest.raises(StoreError, match="another conversion"):
            run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]


@STRIDE
def test_after_a_disk_error_at_any_change_the_next_run_completes(
    model_dir, whole, tmp_path, monkeypatch, stride
):
    """Every `stride`-th rename, unlink and fsync fails once."""
    step, typed, fired = 0, 0, True
    while fired:
        step, calls, fired = step + stride, 0, False
        directory, cache = tmp_path / f"model{step}", tmp_path / f"cache{step}"
        shutil.copytree(model_dir, directory)

        def failing(real, step=step):
            def call(*arguments, **options):
                nonlocal calls, fired
                calls += 1
                if calls == step:
                    fired = True
                    raise OSError(errno.EIO, "Input/output error")
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "fsync"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                run(directory, cache_dir=cache, drop_source=True)
            except ParoquantStreamError as error:
                typed += "Input/output error" in str(error)
        assert digests(run(directory, cache_dir=cache, drop_source=True)) == whole
        assert shards(directory) == []
        shutil.rmtree(directory)
        shutil.rmtree(cache)
    assert typed > 20 // stride


class Barriers:
    """What a run does to the disk of a Mac, in order: `F_FULLFSYNC`, names given and removed."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(descriptor, "_FULL_SYNC", 51)  # private: a constant of the system
        monkeypatch.setattr(descriptor, "fcntl", self)
        monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("no barrier"))
        for name in ("replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, partial(self._named, name, getattr(os, name)))

    def fcntl(self, fd, command, argument=0):
        if command != 51:
            return fcntl.fcntl(fd, command, argument)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        self.events.append(("full", "temp" if is_temp(path.name[-len(temp_name()) :]) else path))
        return 0

    def _named(self, call, real, name, *new, **where):
        self.events.append((call, (new or (name,))[0] if call != "rename" else name))
        return real(name, *new, **where)


@pytest.mark.skipif(sys.platform != "linux", reason="looks names up in /proc")
@pytest.mark.parametrize("before", ["converted before", "in one run"])
def test_on_macos_all_that_is_left_passes_the_drives_cache_first(model_dir, monkeypatch, before):
    """Entry, digest and their directories, then both records, then the note, then the removal."""
    if before == "converted before":
        run(model_dir)
    store = make_request(model_dir).store
    disk = Barriers(monkeypatch)
    result = run(model_dir, drop_source=True)
    for record in result.manifest.entries:
        entry, removed = store.entry_path(record.key), disk.events.index(("rename", record.shard))
        (drop_id,) = record_ids(store)
        expected = [("full", path) for path in (entry.with_suffix(".digest"), entry)]
        expected += [("full", entry.parent), ("full", entry.parent.parent)]
        for copy in ("first", "second"):
            expected += [("full", "temp"), ("replace", f"{drop_id}.{copy}.msgpack")]
            expected += [("full", store.folder("dropped"))]
        if record is result.manifest.entries[0]:
            expected += [("full", "temp"), ("replace", NOTE), ("full", model_dir)]
        done = iter(disk.events[:removed])
        assert [event for event in expected if event not in done] == [], record.shard
