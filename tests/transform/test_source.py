"""A task's source: what is hashed is what is converted, or nothing is stored."""

from __future__ import annotations

import os

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import MalformedFileError, SourceChangedError
from paroquant_stream.files import hashing
from paroquant_stream.transform.source import Source
from tests.benchmarks.end_to_end.checkpoint import as_saved, make_checkpoint
from tests.helpers.builders import write_checkpoint


def entries(tmp_path) -> list:
    return list((tmp_path / "cache").rglob("entries/*/*.safetensors"))


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "m")


def change_after(monkeypatch, reads: int, change) -> list[int]:
    """Calls `change` right after the `reads`-th read of any file."""
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
    """At each read in turn, until the last: an entry is never filed under a hash its bytes do not
    have.
    """
    shard = directory / "model.safetensors"
    original = shard.read_bytes()
    step, refused = 0, 0
    while True:
        step += 7  # every seventh of about 150 reads
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
    """A store through mmap may leave every time as it was; here between hash and conversion."""
    real, fired = Source.hash, []

    def hash_then_change(self):
        digest = real(self)
        if not fired:
            fired.append(1)
            rewrite(directory / "model.safetensors")()
        return digest

    monkeypatch.setattr(Source, "_unchanged", lambda self: True)
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
