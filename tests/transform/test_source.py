"""A shard that changes while it is read is an error, and nothing is stored."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import MalformedFileError, SourceChangedError, SourceDamagedError
from paroquant_stream.files import hashing
from paroquant_stream.transform.source import Source
from tests.benchmarks.end_to_end.checkpoint import as_saved, make_checkpoint
from tests.helpers.builders import as_hub_snapshot, flip, write_checkpoint


def entries(tmp_path) -> list:
    return list((tmp_path / "cache").rglob("entries/*/*.safetensors"))


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "m")


def change_after(monkeypatch, reads: int, change) -> list[int]:
    """Call `change` right after the `reads`-th read of any file."""
    calls: list[int] = []
    for name in ("pread", "preadv"):
        real = getattr(os, name)

        def read(*arguments, real=real):
            result = real(*arguments)
            calls.append(1)
            if len(calls) == reads:
                change()
            return result

        monkeypatch.setattr(os, name, read)
    return calls


def rewrite(path):
    def change():
        with path.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    return change


def truncate(path):
    return lambda: os.truncate(path, path.stat().st_size - 100)


def append(path):
    def change():
        with path.open("ab") as file:
            file.write(b"more")

    return change


@pytest.mark.parametrize("change", [rewrite, truncate, append])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_that_changes_is_never_stored_wrong(
    directory, tmp_path, monkeypatch, change, threads
):
    """An entry is never stored under a hash that its bytes do not have, whenever they change."""
    shard = directory / "model.safetensors"
    original = shard.read_bytes()
    step, refused = 0, 0
    while True:
        step += 11  # every eleventh of about 150 reads
        shard.write_bytes(original)
        request = make_request(directory, cache_dir=tmp_path / f"cache{step}", jobs=threads)
        with monkeypatch.context() as patch:
            calls = change_after(patch, step, change(shard))
            try:
                convert(request)
            except (SourceChangedError, MalformedFileError):
                assert not list((tmp_path / f"cache{step}").rglob("*.safetensors"))
                refused += 1
        if len(calls) < step:
            break
    assert refused > 5


@pytest.mark.parametrize("threads", [1, 2])
def test_fingerprints_reveal_a_change_that_stat_hides(directory, tmp_path, monkeypatch, threads):
    """Writing through mmap may leave all times unchanged; here between hash and conversion."""
    real, fired = Source.hash, []

    def hash_then_change(self):
        digest = real(self)
        if not fired:
            fired.append(1)
            rewrite(directory / "model.safetensors")()
        return digest

    monkeypatch.setattr(Source, "_unchanged", lambda self: True)  # private: what compares stats
    monkeypatch.setattr(Source, "may_be_known", lambda self: True)  # so it is hashed first
    monkeypatch.setattr(Source, "hash", hash_then_change)
    with pytest.raises(SourceChangedError, match="changed during the conversion"):
        convert(make_request(directory, cache_dir=tmp_path / "cache", jobs=threads))
    assert fired
    assert entries(tmp_path) == []


@pytest.mark.parametrize("order", [None, as_saved], ids=["model order", "by type"])
def test_the_large_tensors_of_a_shard_are_read_once(tmp_path, monkeypatch, order):
    sizes = {"layers": 1, "hidden": 1024, "intermediate": 2048, "heads": 8}
    make_checkpoint(tmp_path / "m", shards=1, **sizes, order=order)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    reads = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, v, at: reads.append(len(v[0])) or real(f, v, at))
    convert(make_request(tmp_path / "m", cache_dir=tmp_path / "cache", jobs=1))
    assert size < sum(reads) < 1.05 * size  # again: scales, or zeros, for the biases


def test_sources_are_read_and_never_mapped(directory, tmp_path, monkeypatch):
    import mmap

    real = mmap.mmap
    monkeypatch.setattr(
        mmap, "mmap", lambda fd, size: real(fd, size) if fd == -1 else pytest.fail("a file")
    )
    convert(make_request(directory, cache_dir=tmp_path / "cache", jobs=1))
    assert len(entries(tmp_path)) == 1


def test_no_chunk_is_larger_than_one_linear_or_the_read_size(directory, tmp_path, monkeypatch):
    sizes = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, v, at: sizes.append(len(v[0])) or real(f, v, at))
    convert(make_request(directory, cache_dir=tmp_path / "cache", jobs=1))
    assert 0 < max(sizes) <= hashing.CHUNK


@pytest.fixture
def task(directory, tmp_path):
    """Return the task of the only shard, and the store."""
    request = make_request(directory, cache_dir=tmp_path / "cache")
    request.store.create()
    return plan_model(request).plan.tasks[0], request.store


def opened(directory, task, tick=lambda _: None) -> Source:
    return Source(task[0], directory, task[1].digest_cache, tick)


def first_part(task):
    return task[0].operations[0].slices[0][0]


def test_a_part_that_changes_between_two_reads_is_an_error(directory, task):
    part = first_part(task)
    source = opened(directory, task)
    source.hash()
    source.whole(part)
    flip(directory / part.shard, part.start)
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        source.whole(part)
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        list(source.chunks(part))
    source.close()


def test_a_file_that_changed_since_it_was_opened_is_an_error(directory, task):
    source = opened(directory, task)
    source.hash()
    os.utime(directory / "model.safetensors", (1, 1))
    with pytest.raises(SourceChangedError, match="its size or times changed"):
        source.check()
    source.close()


def test_a_blob_with_another_hash_than_its_name_is_an_error(directory, tmp_path):
    snapshot = as_hub_snapshot(directory, tmp_path / "models--owner--name")
    (blob,) = (tmp_path / "models--owner--name" / "blobs").iterdir()
    flip(blob, blob.stat().st_size - 1)
    request = make_request(snapshot, cache_dir=tmp_path / "cache")
    request.store.create()
    shard = plan_model(request).plan.tasks[0], request.store
    source = opened(snapshot, shard)
    with pytest.raises(SourceDamagedError, match=f"expected SHA-256 {blob.name}"):
        source.check()
    source.close()


def test_helpers_stop_hashing_when_the_conversion_fails(directory, task, monkeypatch):
    """The run must not wait until the whole shard is hashed."""
    monkeypatch.setattr(hashing, "CHUNK", 4096)
    failed, counts = threading.Event(), []

    def tick(count):
        counts.append(count)
        failed.wait(30)

    source = opened(directory, task, tick)

    class DiskFullError(Exception):
        pass

    def fail():
        with source.hashed_by(pool):
            raise DiskFullError

    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(DiskFullError):
            fail()
        failed.set()
    source.close()
    assert sum(counts) < task[0].size


def test_an_error_of_a_hashing_helper_is_raised(directory, task, monkeypatch):
    def fail(_source):
        raise MalformedFileError("ends too early")

    source = opened(directory, task)
    monkeypatch.setattr(Source, "hash", fail)
    with (
        ThreadPoolExecutor(3) as pool,
        pytest.raises(MalformedFileError, match="too early"),
        source.hashed_by(pool),
    ):
        pass
    source.close()


def test_closing_closes_every_shard(scattered_dir, tmp_path):
    request = make_request(scattered_dir, cache_dir=tmp_path / "cache")
    request.store.create()
    task = next(task for task in plan_model(request).plan.tasks if task.borrowed)
    before = len(os.listdir("/dev/fd"))
    source = Source(task, scattered_dir, request.store.digest_cache, lambda _: None)
    source.borrowed_sha256()
    assert len(os.listdir("/dev/fd")) > before + 1
    source.close()
    assert len(os.listdir("/dev/fd")) == before


def test_a_damaged_header_leaves_no_descriptor(directory, task):
    before = len(os.listdir("/dev/fd"))
    (directory / "model.safetensors").write_bytes(b"\xff" * task[0].size)
    with pytest.raises(MalformedFileError):
        opened(directory, task)
    assert len(os.listdir("/dev/fd")) == before
