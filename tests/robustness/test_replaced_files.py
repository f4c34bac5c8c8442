"""What takes another file's place is noticed: in a Hub's cache, in images, behind a FUSE.

Everything runs on real file systems, with their own times; only how long a file has to be left
alone is shortened.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paroquant_stream.api.load import load
from paroquant_stream.checkpoint.shard import Shard
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import SourceChangedError, SourceDamagedError
from paroquant_stream.files import descriptor, digest_cache
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import _observe
from paroquant_stream.files.filesystems import Ctime
from paroquant_stream.files.hashing import SourceHasher
from tests.helpers.builders import as_hub_snapshot, flip, uncovered, write_checkpoint
from tests.helpers.images import LINUX_ROOT, eroded, extended, in_loop, squashed, without_ctime

NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def _old(monkeypatch):
    monkeypatch.setattr(descriptor, "RACY_SECONDS", -1)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", -1)
    monkeypatch.setattr(descriptor, "WIDE_SECONDS", -1)


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """The bytes of every source that is hashed by reading it."""
    hashed: list[int] = []
    real = SourceHasher._pass  # private: all bytes pass it, whoever has read them
    monkeypatch.setattr(
        SourceHasher, "_pass", lambda self, view: hashed.append(len(view)) or real(self, view)
    )
    return hashed


def run(directory, **options):
    return convert(make_request(directory, jobs=1, **options))


def digests(result) -> list[str]:
    return [record.digest for record in result.manifest.entries]


def golden(directory, cache: Path) -> list[str]:
    """The digests of the entries that an empty cache gets."""
    return digests(run(directory, cache_dir=cache))


def seen(path: Path):
    """All that the digest cache sees of a file; no public function gives it."""
    with path.open("rb") as file:
        return _observe(file.fileno())


def change_unseen(path: Path) -> None:
    """Flips a bit that no sample covers and restores the mtime."""
    before, status = seen(path), path.stat()
    flip(path, uncovered(path))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = seen(path)
    assert (after.sample, after.stamp.mtime_ns) == (before.sample, before.stamp.mtime_ns)


def test_on_a_file_system_with_a_ctime_a_change_is_noticed_by_it(tmp_path, hashed):
    directory = write_checkpoint(tmp_path / "m")
    if seen(directory / NAME).kind is not Ctime.LOCAL:
        pytest.skip("the tests' directory lies on no file system that is known to keep a ctime")
    run(directory)
    hashed.clear()
    run(directory)
    assert hashed == []
    change_unseen(directory / NAME)
    result = run(directory)
    assert [report.why for report in result.shards] == ["content changed"]
    assert digests(result) == golden(directory, tmp_path / "golden")


@pytest.mark.usefixtures("settled")
def test_a_shard_that_changes_meanwhile_is_not_remembered(tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "m")
    real = SourceHasher.finish

    def finish(self):
        digest = real(self)
        change_unseen(directory / NAME)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(SourceHasher, "finish", finish)
        with pytest.raises(SourceChangedError):
            run(directory)
    shard = Shard(NAME, directory / NAME)
    assert shard.known_sha256(make_request(directory).store.digest_cache) is None
    assert digests(run(directory)) == golden(directory, tmp_path / "golden")


@pytest.fixture
def snapshot(tmp_path) -> Path:
    return as_hub_snapshot(write_checkpoint(tmp_path / "m"), tmp_path / "models--owner--name")


@pytest.mark.parametrize("again", [run, load])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.usefixtures("settled")
def test_a_blob_overwritten_in_place_is_not_trusted_by_name(snapshot, again, sampled):
    run(snapshot)
    again(snapshot)
    blob = (snapshot / NAME).resolve()
    status = blob.stat()
    flip(blob, status.st_size - 1 if sampled else uncovered(blob))
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        SourceDamagedError, match=f"expected SHA-256 {blob.name} as the Hub names it"
    ):
        again(snapshot)


@pytest.mark.usefixtures("settled")
def test_a_blob_that_was_never_hashed_here_is_hashed_once(snapshot, tmp_path, hashed):
    size = (snapshot / NAME).stat().st_size
    before = run(snapshot)
    assert sum(hashed) == size  # in the one pass of the conversion
    load(snapshot)
    assert sum(hashed) == size
    for memo in make_request(snapshot).store.folder("memo").iterdir():
        memo.unlink()
    assert [report.action for report in run(snapshot).shards] == ["reused"]
    assert sum(hashed) == 2 * size
    assert digests(run(snapshot)) == digests(before)
    assert sum(hashed) == 2 * size


@pytest.mark.parametrize("by", ["conversion", "verification"])
def test_a_young_blob_that_was_hashed_here_is_known_by_its_name(snapshot, hashed, monkeypatch, by):
    monkeypatch.setattr(descriptor, "RACY_SECONDS", 3600)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", 3600)
    monkeypatch.setattr(descriptor, "WIDE_SECONDS", 3600)
    run(snapshot)
    memo = make_request(snapshot).store.digest_cache
    if by == "verification":
        monkeypatch.setattr(digest_cache, "ctime_kind", lambda *_: Ctime.NONE)
        for file in memo.directory.iterdir():
            file.unlink()
        Shard(NAME, snapshot / NAME).sha256(memo)
    hashed.clear()
    run(snapshot)
    load(snapshot)
    assert hashed == []


@LINUX_ROOT
@pytest.mark.parametrize("build", [squashed, eroded, extended])
def test_an_image_in_the_place_of_another_is_read_again(tmp_path, build):
    """Two images that differ in one byte of one file, one after the other in one loop device."""
    directory, where = write_checkpoint(tmp_path / "m"), tmp_path / "mounted"
    where.mkdir()
    first = build(directory, tmp_path / "first")
    flip(directory / NAME, uncovered(directory / NAME))
    second, right = build(directory, tmp_path / "second"), golden(directory, tmp_path / "golden")
    with in_loop(first, where) as device:
        before = seen(where / NAME)
        assert digests(run(where)) != right
        load(where)
    with in_loop(second, where, device):
        assert seen(where / NAME) == before  # nothing that is seen without reading tells them apart
        assert digests(run(where)) == right
        load(where)
        assert digests(run(where)) == right


@LINUX_ROOT
def test_without_a_ctime_a_change_is_noticed_by_reading(tmp_path):
    directory, where = write_checkpoint(tmp_path / "m"), tmp_path / "mounted"
    where.mkdir()
    with without_ctime(directory, where):
        before = seen(where / NAME)
        assert (before.kind, before.stamp.ctime_ns) == (Ctime.UNKNOWN, before.stamp.mtime_ns)
        first = digests(run(where))
        change_unseen(directory / NAME)
        assert seen(where / NAME) == before
        result = run(where)
        assert [report.why for report in result.shards] == ["content changed"]
        assert digests(result) == golden(directory, tmp_path / "golden") != first


@LINUX_ROOT
def test_a_hashed_blob_is_known_by_name_without_a_ctime(tmp_path, hashed):
    directory, repository = write_checkpoint(tmp_path / "m"), tmp_path / "models--owner--name"
    snapshot = as_hub_snapshot(directory, repository)
    blobs = repository / "blobs"
    blobs.rename(tmp_path / "real")
    blobs.mkdir()
    with without_ctime(tmp_path / "real", blobs):
        run(snapshot)
        hashed.clear()
        run(snapshot)
        assert hashed == []
        (blob,) = (tmp_path / "real").iterdir()
        flip(blob, blob.stat().st_size - 1)
        with pytest.raises(SourceDamagedError):
            run(snapshot)


def test_an_entry_where_no_ctime_is_kept_is_hashed_at_every_load(tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "m")
    monkeypatch.setattr(digest_cache, "ctime_kind", lambda *_: Ctime.NONE)
    (record,) = run(directory).manifest.entries
    load(directory)
    path = make_request(directory).store.entry_path(record.key)
    good, stamp = path.read_bytes(), FileStamp.of(path.stat())
    change_unseen(path)
    real = FileStamp.of
    monkeypatch.setattr(
        FileStamp, "of",
        classmethod(lambda _, s: stamp if s.st_ino == stamp.inode else real(s)),
    )  # fmt: skip
    load(directory)
    assert path.read_bytes() == good
