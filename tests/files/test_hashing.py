"""Digests: of the file, of each tensor, and every byte read once."""

from __future__ import annotations

import hashlib
import os

import pytest
import xxhash

from paroquant_stream.errors import SourceChangedError
from paroquant_stream.files.hashing import SourceHasher, hash_entry, read_chunks
from paroquant_stream.files.tensor_header import TensorInfo

DATA = bytes(range(256)) * 50_000  # 12.8 MB, over three chunks


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    yield fd
    os.close(fd)


def test_chunks_are_the_bytes_in_order_in_the_buffer_that_is_given(fd):
    buffer = memoryview(bytearray(5_000_000))
    sizes, seen = [], bytearray()
    for chunk in read_chunks(fd, 3, len(DATA) - 2, "x", buffer):
        sizes.append(len(chunk))
        seen += chunk
    assert bytes(seen) == DATA[3:-2]
    assert sizes == [5_000_000, 5_000_000, len(DATA) - 5 - 10_000_000]


def test_short_reads_are_continued(fd, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, views, at: real(f, [views[0][:999_983]], at))
    assert hash_entry(fd, "x") == xxhash.xxh3_128_hexdigest(DATA)


def test_a_file_that_ends_early_is_an_error(fd):
    with pytest.raises(SourceChangedError, match="shorter"):
        list(read_chunks(fd, 0, len(DATA) + 1, "x", memoryview(bytearray(100_000))))


FIRST = TensorInfo("a", "U8", (100,), 10, 110)
EMPTY = TensorInfo("e", "U8", (0,), 110, 110)
SECOND = TensorInfo("b", "U8", (len(DATA) - 500,), 400, len(DATA) - 100)
WANTED = {
    "a": xxhash.xxh3_128_digest(DATA[10:110]),
    "e": xxhash.xxh3_128_digest(b""),
    "b": xxhash.xxh3_128_digest(DATA[400:-100]),
}


def test_one_pass_gives_the_hash_of_the_file_and_of_each_tensor(fd):
    ticks: list[int] = []
    hasher = SourceHasher(fd, (FIRST, EMPTY, SECOND), len(DATA), "x", ticks.append)
    found = hasher.finish()
    assert found.sha256 == hashlib.sha256(DATA).hexdigest()
    assert found.fingerprints == WANTED
    assert sum(ticks) == len(DATA)


def test_bytes_that_were_read_for_another_end_are_not_read_again(fd, monkeypatch):
    hasher = SourceHasher(fd, (FIRST, EMPTY, SECOND), len(DATA), "x", lambda _: None)
    hasher.advance(50)
    hasher.update(memoryview(DATA[50:5000]))
    reads = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, v, at: reads.append(at) or real(f, v, at))
    hasher.advance(1000)  # is behind
    found = hasher.finish()
    assert min(reads) == 5000
    assert found.sha256 == hashlib.sha256(DATA).hexdigest()
    assert found.fingerprints == WANTED


def test_an_entry_is_hashed_whole(fd):
    assert hash_entry(fd, "x") == xxhash.xxh3_128_hexdigest(DATA)
