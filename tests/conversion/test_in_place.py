"""A model directory is untrusted: no link at or below `mlx/` is followed, and a load only reads."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.api.load import load
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.in_place import shipped
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import StoreError
from tests.helpers.builders import cut_evenly, temp_of, write_checkpoint

PLACES = ["mlx", "mlx/v1", "mlx/v1/tmp", "mlx/v1/entries", "mlx/v1/manifests", "mlx/v1/memo"]
PLACES += ["mlx/v1/dropped", "mlx/v1/entries/*"]


def look(*directories) -> dict:
    """Every path with its bytes and times, links as links."""
    found = {}
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            status = path.lstat()
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[path] = (status.st_mode, status.st_mtime_ns, status.st_ino, data)
    return found


@pytest.fixture
def outside(tmp_path):
    """Files of another user, some with names of our form, a day and more old."""
    outside = tmp_path / "outside"
    for name in ("v1/tmp", "v1/entries/ab", "v1/manifests", "v1/memo", "v1/dropped", "ab"):
        (outside / name).mkdir(parents=True)
    for name in (temp_of(4194305), "notes.txt", "1-2-3", "ab" * 32 + ".safetensors"):
        for folder in (outside, outside / "v1/tmp", outside / "v1/memo", outside / "ab"):
            (folder / name).write_bytes(b"precious")
            os.utime(folder / name, (0, 0))
    return outside


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["convert", "drop", "load"])
def test_nothing_outside_changes_whatever_a_link_leads_to(model_dir, outside, place, what):
    convert(make_request(model_dir, in_place=True, jobs=1))
    (path, *_) = sorted(model_dir.glob(place))
    shutil.rmtree(path)
    path.symlink_to(outside)
    before = look(outside)
    if what == "load":
        load(model_dir, jobs=1)
    else:
        drop = what == "drop"
        with contextlib.suppress(StoreError):  # the memo alone is no reason to fail
            convert(make_request(model_dir, in_place=True, jobs=1, drop_source=drop, force=True))
    assert look(outside) == before
    path.unlink()  # and nothing is lost
    convert(make_request(model_dir, in_place=True, jobs=1))


@pytest.mark.parametrize("dropped", [False, True])
def test_a_load_of_a_tree_beside_a_model_writes_nothing_there(model_dir, tmp_path, dropped):
    convert_checkpoint(model_dir, in_place=True, drop_source=dropped)
    shutil.copytree(model_dir, tmp_path / "another user's")
    user = make_request(model_dir).store
    convert_checkpoint(write_checkpoint(tmp_path / "other"))
    before = look(tmp_path / "another user's", user.root)
    load(tmp_path / "another user's")
    load(tmp_path / "another user's", verify="full")
    assert look(tmp_path / "another user's", user.root) == before


def test_a_damaged_in_place_tree_stays_and_sources_are_converted(model_dir, caplog):
    manifest = convert_checkpoint(model_dir, in_place=True)
    path = make_request(model_dir, in_place=True).store.entry_path(manifest.entries[0].key)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    before = look(model_dir)
    load(model_dir, verify="full")
    assert look(model_dir) == before
    assert "left in place" in caplog.text
    assert len(list(make_request(model_dir).store.folder("entries").rglob("*.safetensors"))) == 3


def test_cache_entries_that_a_tree_links_to_stay(model_dir):
    """A link in the place of an entry is no entry, and taking one out of use moves the link."""
    manifest = convert_checkpoint(model_dir)
    convert_checkpoint(model_dir, in_place=True)
    user, beside = (make_request(model_dir, in_place=where).store for where in (False, True))
    for record in manifest.entries:
        beside.entry_path(record.key).unlink()
        beside.entry_path(record.key).symlink_to(user.entry_path(record.key))
    before = look(user.folder("entries"))
    load(model_dir)
    convert_checkpoint(model_dir, in_place=True)
    assert look(user.folder("entries")) == before
    assert not any(beside.entry_path(record.key).is_symlink() for record in manifest.entries)


def test_a_tree_that_others_can_write_into_is_not_used(model_dir, caplog):
    convert_checkpoint(model_dir, in_place=True)
    (model_dir / "mlx" / "v1" / "entries").chmod(0o777)
    load(model_dir)
    assert "others can write into it" in caplog.text


def test_a_tree_of_a_newer_format_is_not_used(model_dir, caplog):
    request = make_request(model_dir, in_place=True, jobs=1)
    convert_checkpoint(model_dir, in_place=True, drop_source=True)
    assert shipped(make_request(model_dir))
    request.store.manifest_path(request.manifest_name).unlink()
    for path in request.store.folder("dropped").iterdir():
        data = bytearray(path.read_bytes())
        data[10:12] = (99).to_bytes(2, "little")  # the major version
        path.write_bytes(data)
    assert shipped(make_request(model_dir)) is None
    assert "is not used: manifest format 99" in caplog.text


def test_an_in_place_conversion_locks_the_directory(tmp_path):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(2))
    convert_checkpoint(directory, in_place=True)
    assert not (directory / "mlx" / "v1" / "locks").exists()
