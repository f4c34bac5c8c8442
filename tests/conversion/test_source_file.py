"""A source goes only if it is the file that was read, and only from where it really is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from paroquant_stream.conversion.source_file import SourceFile, put_all_back, remove_dangling_link
from paroquant_stream.errors import MalformedFileError, SourceChangedError, StoreError
from paroquant_stream.files.folder import Folder

NAME = "model.safetensors"


def remove(path: Path) -> None:
    with Folder.open(path.parent) as model_dir:
        source = SourceFile(model_dir, path.name)
        try:
            source.remove()
        finally:
            source.close()


@pytest.fixture
def model_dir(tmp_path):
    with Folder.open(tmp_path) as model_dir:
        yield model_dir


def snapshot(hub: Path, repository: str, data: bytes, commit: str = "c" * 40) -> Path:
    """The shard of a model in a Hub cache."""
    etag = hashlib.sha256(data).hexdigest()
    directory = hub / f"models--owner--{repository}" / "snapshots" / commit
    directory.mkdir(parents=True)
    blobs = directory.parents[1] / "blobs"
    blobs.mkdir(exist_ok=True)
    (blobs / etag).write_bytes(data)
    (directory / NAME).symlink_to(f"../../blobs/{etag}")
    return directory / NAME


def test_a_plain_file_goes(tmp_path):
    (tmp_path / NAME).write_bytes(b"x")
    remove(tmp_path / NAME)
    assert not list(tmp_path.iterdir())


def test_a_link_inside_the_model_directory_goes_with_its_file(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"x")
    (tmp_path / "hop").symlink_to("real.bin")
    (tmp_path / NAME).symlink_to("hop")
    remove(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_the_hubs_cache_goes_with_its_blob(tmp_path):
    shard = snapshot(tmp_path, "one", b"x")
    other = snapshot(tmp_path, "two", b"x")
    remove(shard)
    assert not os.path.lexists(shard)
    assert list((tmp_path / "models--owner--one" / "blobs").iterdir()) == []
    assert other.read_bytes() == b"x"


def test_a_blob_that_another_revision_uses_stays(tmp_path):
    shard = snapshot(tmp_path, "one", b"x")
    other = snapshot(tmp_path, "one", b"x", "d" * 40)
    remove(shard)
    assert not os.path.lexists(shard)
    assert other.read_bytes() == b"x"
    remove(other)
    assert list((tmp_path / "models--owner--one" / "blobs").iterdir()) == []


def test_through_a_link_to_the_snapshot_the_same_blob_goes(tmp_path):
    shard = snapshot(tmp_path / "hub", "one", b"x")
    (tmp_path / "model").symlink_to(shard.parent)
    remove(tmp_path / "model" / NAME)
    assert not os.path.lexists(shard)


@pytest.mark.parametrize("users", [1, 2])
def test_a_shared_blob_is_removed_with_its_last_user(tmp_path, users):
    """Since its pull request 4498 a blob may be a link to a file that repositories share."""
    shared = pytest.importorskip(
        "huggingface_hub.utils._shared_blobs", reason="this version of the client shares no blobs"
    )
    cache, xet, sha256 = tmp_path / "hub", "e" * 64, "a" * 64
    paths = []
    for user in range(users):
        repo = cache / f"models--owner--m{user}"
        snapshot = repo / "snapshots" / ("c" * 40)
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (repo / "blobs" / sha256).write_bytes(b"12345")
        assert shared.publish_blob_to_shared_store(
            blob_path=str(repo / "blobs" / sha256), xet_hash=xet, cache_dir=str(cache),
            expected_size=5, replace_existing=False,
        )  # fmt: skip
        paths.append(snapshot / "model.safetensors")
        paths[-1].symlink_to(f"../../blobs/{sha256}")
    blob = shared.shared_blob_path(cache, xet)
    assert (cache / "models--owner--m0" / "blobs" / sha256).is_symlink()
    remove(paths[0])
    assert not os.path.lexists(paths[0])
    assert not os.path.lexists(cache / "models--owner--m0" / "blobs" / sha256)
    assert blob.exists() == (users == 2)
    assert all(path.read_bytes() == b"12345" for path in paths[1:])


@pytest.mark.parametrize(
    "spelling",
    [
        "{hub}/models--owner--victim/blobs/{etag}",
        "models--a/blobs/{etag}",
        "../hub/models--owner--victim/blobs/{etag}",
        "../hub/models--owner--victim/snapshots/" + "c" * 40 + "/" + NAME,
        "inner/{etag}",
    ],
)
def test_a_link_to_another_models_file_removes_nothing(tmp_path, spelling):
    victim = snapshot(tmp_path / "hub", "victim", b"precious")
    etag = os.path.basename(os.readlink(victim))
    model = tmp_path / "model"
    (model / "models--a").mkdir(parents=True)
    blobs = victim.parents[2] / "blobs"
    (model / "models--a" / "blobs").symlink_to(blobs)
    (model / "inner").symlink_to(blobs)
    (model / NAME).symlink_to(spelling.format(hub=tmp_path / "hub", etag=etag))
    assert (model / NAME).read_bytes() == b"precious"
    with pytest.raises(StoreError, match="neither directly in the model directory"):
        remove(model / NAME)
    assert victim.read_bytes() == (model / NAME).read_bytes() == b"precious"


def test_a_link_to_another_repositorys_blob_removes_nothing(tmp_path):
    victim = snapshot(tmp_path, "victim", b"precious")
    shard = snapshot(tmp_path, "one", b"x")
    shard.unlink()
    shard.symlink_to(
        f"../../../models--owner--victim/blobs/{os.path.basename(os.readlink(victim))}"
    )
    with pytest.raises(StoreError, match="neither directly in the model directory"):
        remove(shard)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("what", ["loop", "fifo", "directory", "absent"])
def test_what_is_no_file_is_an_error(tmp_path, what):
    path = tmp_path / NAME
    if what == "loop":
        path.symlink_to(NAME)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    with pytest.raises((StoreError, MalformedFileError)):
        remove(path)
    assert os.path.lexists(path) == (what != "absent")


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(b"y")
    path.with_name("new").replace(path)


CHANGES = {
    "another file under its name": replaced,
    "appended": lambda path: os.truncate(path, 2),
    "rewritten": lambda path: path.write_bytes(b"y"),
    "gone": os.unlink,
    "a link in its place": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "touched": lambda path: os.utime(path, (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_changed_since_it_was_read_stays(model_dir, tmp_path, change, linked):
    path = tmp_path / NAME
    file = tmp_path / "real.bin" if linked else path
    file.write_bytes(b"x")
    if linked:
        path.symlink_to("real.bin")
    source = SourceFile(model_dir, NAME)
    assert source.sha256() == hashlib.sha256(b"x").hexdigest()
    CHANGES[change](file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SourceChangedError, match="changed since it was converted"):
        source.remove()
    source.close()
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_changes_while_it_is_hashed_has_no_hash(model_dir, tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(b"x")
    source, real, done = SourceFile(model_dir, NAME), os.preadv, []

    def change(*arguments):
        if not done:
            done.append(os.utime(tmp_path / NAME, (1, 1)))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", change)
    with pytest.raises(SourceChangedError):
        source.sha256()
    source.close()
    assert done


def test_a_link_that_a_killed_run_left_goes_and_no_other(model_dir, tmp_path):
    (tmp_path / NAME).symlink_to("gone")
    (tmp_path / "kept").symlink_to("real")
    (tmp_path / "real").write_bytes(b"x")
    for name in (NAME, "kept", "real", "absent"):
        remove_dangling_link(model_dir, name)
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "real"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_replaced_during_its_removal_stays(model_dir, tmp_path, monkeypatch, linked):
    path = tmp_path / NAME
    file = tmp_path / "real.bin" if linked else path
    file.write_bytes(b"x")
    if linked:
        path.symlink_to("real.bin")
    source, real, done = SourceFile(model_dir, NAME), os.rename, []

    def replace_first(*names, **where):
        if not done:
            done.append(replaced(file))
        real(*names, **where)

    monkeypatch.setattr(os, "rename", replace_first)
    with pytest.raises(SourceChangedError):
        source.remove()
    source.close()
    assert done
    assert path.read_bytes() == b"y"
    assert len(list(tmp_path.iterdir())) == 1 + linked


@pytest.mark.parametrize("links", [True, False])
def test_the_next_run_restores_a_file_renamed_for_removal(model_dir, tmp_path, monkeypatch, links):
    (tmp_path / NAME).write_bytes(b"x")
    source = SourceFile(model_dir, NAME)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            source.remove()
    source.close()
    assert not (tmp_path / NAME).exists()
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: os.stat(tmp_path / "absent"))
    put_all_back(tmp_path, {NAME})
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == b"x"


def test_a_blob_on_its_way_out_gets_its_name_back(tmp_path):
    shard = snapshot(tmp_path, "one", b"x")
    blob = shard.resolve()
    blob.rename(blob.with_name(f".{blob.name}.0123456789abcdef.removing"))
    put_all_back(shard.parent, {NAME})
    assert shard.read_bytes() == b"x"


def test_a_restored_file_takes_no_name_that_another_has(tmp_path):
    aside = tmp_path / f".{NAME}.0123456789abcdef.removing"
    aside.write_bytes(b"x")
    (tmp_path / NAME).write_bytes(b"y")
    put_all_back(tmp_path, {NAME})
    assert (tmp_path / NAME).read_bytes() == b"y"
    assert aside.read_bytes() == b"x"


def test_without_hard_links_a_restored_file_takes_no_name_either(tmp_path, monkeypatch):
    aside = tmp_path / f".{NAME}.0123456789abcdef.removing"
    aside.write_bytes(b"x")
    (tmp_path / NAME).write_bytes(b"y")

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="cannot be renamed: Operation not permitted"):
        put_all_back(tmp_path, {NAME})
    assert (tmp_path / NAME).read_bytes() == b"y"
    assert aside.read_bytes() == b"x"


def test_files_of_such_a_form_that_are_no_shards_stay(tmp_path):
    others = [f".{name}.0123456789abcdef.removing" for name in ("notes.txt", "ab" * 21)]
    for name in others:
        (tmp_path / name).touch()
    put_all_back(tmp_path, {NAME})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
