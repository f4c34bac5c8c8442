"""A shard that changes while it is read is an error, and nothing is stored."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from dataclasses import replace

import pytest
import xxhash

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import MalformedFileError, SourceChangedError
from paroquant_stream.files import hashing
from paroquant_stream.transform.source import Buffers, Source
from tests.benchmarks.end_to_end.checkpoint import as_saved, make_checkpoint
from tests.helpers.builders import flip, write_checkpoint
from tests.helpers.units import ignore, jobs_of, make_small, whole_unit


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
@pytest.mark.parametrize("threads", [1, 3])
def test_a_source_that_changes_is_never_stored_wrong(
    directory, tmp_path, monkeypatch, change, threads
):
    """An entry is never stored under a hash that its bytes do not have, whenever they change."""
    if threads > 1:
        make_small(monkeypatch)
    shard = directory / "model.safetensors"
    original = shard.read_bytes()
    step, refused = 0, 0
    while True:
        step += 11 if threads == 1 else 29  # of about 150 reads, or 300
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
    assert refused > 3


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
    real = mmap.mmap
    monkeypatch.setattr(
        mmap, "mmap", lambda fd, *rest: real(fd, *rest) if fd == -1 else pytest.fail("a file")
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
def unit(directory, tmp_path):
    """Return the unit of the only shard."""
    (job,) = jobs_of(directory, tmp_path / "cache")
    with whole_unit(job) as unit:
        yield unit


def first_part(unit):
    return unit.steps[0].operation.slices[0][0]


def test_a_part_that_changes_between_two_reads_is_an_error(directory, unit):
    part = first_part(unit)
    source = Source(replace(unit, hashed=None), ignore)
    source.whole(part)
    flip(directory / part.shard, part.start)
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        source.whole(part)
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        list(source.chunks(part))
    source.close()


def test_a_part_behind_the_hash_has_a_fingerprint_of_its_own(directory, unit):
    source, part = Source(unit, ignore), first_part(unit)
    source.finish_hash()
    data = bytes(source.whole(part))
    assert source.read == {(part.start, part.stop): xxhash.xxh3_128_digest(data)}
    assert b"".join(map(bytes, source.chunks(part))) == data
    source.close()


def test_a_unit_without_a_hash_has_none(unit):
    source = Source(replace(unit, hashed=None), ignore)
    assert source.finish_hash() is None
    source.close()


def test_the_hash_is_remembered(directory, unit, settled):
    source = Source(unit, ignore)
    digest = source.finish_hash()
    source.close()
    with (directory / "model.safetensors").open("rb") as file:
        assert unit.store.digest_cache.lookup(file.fileno()) == digest.sha256


def test_a_borrowed_part_has_a_sha256_and_no_fingerprint(scattered_dir, tmp_path):
    job = next(job for job in jobs_of(scattered_dir, tmp_path / "cache") if job.task.borrowed)
    (shard, (part, *_)) = next(iter(job.task.borrowed.items()))
    with whole_unit(job) as unit:
        source = Source(unit, ignore)
        before = len(os.listdir("/dev/fd"))
        data = bytes(source.whole(part))
        assert len(os.listdir("/dev/fd")) == before + 1
        assert source.borrowed == {part.name: hashlib.sha256(data).digest()}
        assert source.read == {}
        flip(scattered_dir / shard, part.start)
        with pytest.raises(SourceChangedError, match="changed while it was read"):
            source.whole(part)
        source.close()


def test_closing_closes_every_shard(scattered_dir, tmp_path):
    job = next(job for job in jobs_of(scattered_dir, tmp_path / "cache") if job.task.borrowed)
    with whole_unit(job) as unit:
        before = len(os.listdir("/dev/fd"))
        source = Source(unit, ignore)
        for parts in job.task.borrowed.values():
            source.whole(parts[0])
        assert len(os.listdir("/dev/fd")) > before + 1
        source.close()
        source.close()
        assert len(os.listdir("/dev/fd")) == before


def test_a_shard_that_cannot_be_asked_leaves_no_descriptor(unit, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr("paroquant_stream.transform.source.file_status", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Source(unit, ignore)
    assert len(os.listdir("/dev/fd")) == before


def test_buffers_begin_on_a_page():
    """Those of a bytearray would not, nor would they be of huge pages."""
    memory = Buffers().take(1, 1 << 20)
    assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE == 0


def test_buffers_are_reused_and_grow():
    buffers = Buffers()
    first = buffers.take(0, 100)
    first[:] = b"x" * 100
    assert buffers.take(0, 50) == b"x" * 50
    assert buffers.take(0, 100) == b"x" * 100
    assert buffers.take(1, 50) == bytes(50)
    assert len(buffers.take(0, 200)) == 200
