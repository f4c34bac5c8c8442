"""Sources that are removed once their entries are safe: nothing is ever lost by it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from paroquant_stream import drop
from paroquant_stream.api import load, make_request
from paroquant_stream.arrival import Arrivals
from paroquant_stream.conversion import convert
from paroquant_stream.errors import (
    EntryDamaged,
    ParoquantStreamError,
    SourceChanged,
    SourceDropped,
    StoreError,
)
from paroquant_stream.request import read_manifest
from paroquant_stream.survey import survey
from tests.builders import CONFIG, cut_evenly, write_checkpoint

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
    monkeypatch.setattr("paroquant_stream.transform.run_task", lambda *_: pytest.fail("converted"))
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
    monkeypatch.setattr(drop, "hash_entry", lambda *_: "0" * 32)
    with pytest.raises(EntryDamaged, match="was not removed; run again"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]


def test_a_source_that_changed_since_is_kept(model_dir, monkeypatch):
    real = drop.Dropper._read_back

    def change(self, record, task):
        real(self, record, task)
        with (model_dir / record.shard).open("ab") as file:
            file.write(b"new")

    monkeypatch.setattr(drop.Dropper, "_read_back", change)
    with pytest.raises(SourceChanged, match="changed since it was converted"):
        run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]


def test_a_changed_config_says_that_the_source_is_gone_and_what_to_do(model_dir):
    run(model_dir, drop_source=True)
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"note": "no byte depends on it"}))
    assert {r.action for r in run(model_dir).shards} == {"reused"}
    store = make_request(model_dir).store
    store.entry_path(read_manifest(make_request(model_dir)).entries[1].key).unlink()
    with pytest.raises(SourceDropped, match=f"{SECOND}: its entry is absent") as error:
        run(model_dir)
    assert "put them back" in str(error.value)
    with pytest.raises(SourceDropped, match=f"{FIRST}: forced"):
        run(model_dir, force=True)
    with pytest.raises(SourceDropped):
        survey(make_request(model_dir))


def test_another_version_of_an_operation_says_that_the_source_is_gone(model_dir, monkeypatch):
    run(model_dir, drop_source=True)
    monkeypatch.setattr("paroquant_stream.request.TRANSFORM", "newer")
    assert {r.action for r in run(model_dir).shards} == {"reused"}
    monkeypatch.setitem(drop.Task.sha256.func.__globals__["OPERATION_VERSIONS"], "awq_weight", 99)
    with pytest.raises(SourceDropped, match="transform version changed"):
        run(model_dir)


def test_sources_that_come_back_are_sources_again(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "backup")
    run(model_dir, drop_source=True)
    shutil.copytree(tmp_path / "backup", model_dir, dirs_exist_ok=True)
    result = run(model_dir)
    assert {r.action for r in result.shards} == {"reused"}
    assert not any(record.dropped for record in result.manifest.entries)


def test_a_changed_lender_is_noticed_though_its_borrower_is_gone(scattered_dir, tmp_path):
    backup = shutil.copytree(scattered_dir, tmp_path / "backup")
    run(scattered_dir, drop_source=True)
    lender = bytearray((backup / THIRD).read_bytes())
    for tensor in drop.Shard(THIRD, backup / THIRD).header().tensors:
        lender[tensor.start] ^= 1
    (scattered_dir / THIRD).write_bytes(lender)
    with pytest.raises(SourceDropped, match="a part that it borrows changed"):
        run(scattered_dir)


def test_a_header_that_was_lost_is_told(model_dir, monkeypatch):
    manifest = run(model_dir, drop_source=True).manifest
    path = make_request(model_dir).store.header_path(manifest.entries[0].source_sha256)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert run(model_dir).manifest == manifest  # nobody needs it
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"note": 1}))
    with pytest.raises(SourceDropped, match=f"{FIRST}: the header that was kept is damaged"):
        run(model_dir)


def test_a_directory_that_cannot_be_written_is_told_and_nothing_is_lost(
    model_dir, whole, monkeypatch
):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", refuse)
        with pytest.raises(StoreError, match=f"{FIRST}: cannot be removed: Permission denied"):
            run(model_dir, drop_source=True)
    assert shards(model_dir) == [FIRST, SECOND, THIRD]
    assert digests(run(model_dir, drop_source=True)) == whole


def test_less_free_space_than_the_whole_conversion_is_enough(model_dir, monkeypatch):
    needed = sum(r.size for r in run(model_dir, cache_dir=model_dir / "x").manifest.entries)
    monkeypatch.setattr("paroquant_stream.store.Store.free_bytes", lambda _: needed // 2)
    with pytest.raises(StoreError, match="bytes needed"):
        run(model_dir)
    run(model_dir, drop_source=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("converted", [False, True])
def test_cut_off_at_any_change_of_the_disk_the_next_run_completes(
    model_dir, whole, tmp_path, monkeypatch, converted
):
    """Every rename, unlink and fsync in turn is the last thing that a run does."""
    step, cut = 0, 0
    while True:
        step += 1
        directory, cache = tmp_path / f"model{step}", tmp_path / f"cache{step}"
        shutil.copytree(model_dir, directory)
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
        assert digests(run(directory, cache_dir=cache)) == whole  # also without the option
        assert digests(run(directory, cache_dir=cache, drop_source=True)) == whole
        assert shards(directory) == []
        shutil.rmtree(directory)
        shutil.rmtree(cache)
    assert cut > 25


KILL = """
import os, signal, sys
from paroquant_stream import convert
step, calls = int(sys.argv[1]), 0
def deadly(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("replace", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))
sys.exit(convert.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("steps", [(5, 9, 13), pytest.param(range(1, 40), marks=pytest.mark.long)])
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


def test_the_journal_protects_what_was_dropped_until_the_manifest_does(model_dir, monkeypatch):
    request = make_request(model_dir, jobs=1, drop_source=True)
    names = []
    real = Arrivals.finish_task

    def look(self):
        names.append(request.store.manifest_names())
        real(self)

    monkeypatch.setattr(Arrivals, "finish_task", look)
    convert(request)
    assert [drop.journal_name(request)] in names
    assert request.store.manifest_names() == [request.manifest_name]


def test_a_manifest_that_lies_about_lenders_is_not_believed(scattered_dir):
    run(scattered_dir, drop_source=True)
    request = make_request(scattered_dir)
    manifest = read_manifest(request)
    entries = tuple(replace(record, borrowed_sha256=()) for record in manifest.entries)
    request.store.write_manifest(request.manifest_name, replace(manifest, entries=entries).encode())
    (scattered_dir / "config.json").write_text(json.dumps(CONFIG | {"note": 1}))
    with pytest.raises(SourceDropped, match="a part that it borrows changed"):
        run(scattered_dir)


def test_a_disk_error_at_any_change_is_typed_and_the_next_run_completes(
    model_dir, whole, tmp_path, monkeypatch
):
    """Every rename, unlink and fsync in turn fails once."""
    step, typed, fired = 0, 0, True
    while fired:
        step, calls, fired = step + 1, 0, False
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
    assert typed > 20
