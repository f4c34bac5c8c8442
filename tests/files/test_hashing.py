"""Hashes of files and of their tensors, each byte read once."""

from __future__ import annotations

import hashlib
import os
import random
import threading

import pytest
import xxhash

from paroquant_stream.errors import SourceChangedError, UnreadableFileError
from paroquant_stream.files import hashing
from paroquant_stream.files.hashing import (
    CHUNK,
    SourceHasher,
    hash_parts,
    one_ahead,
    read_chunks,
    sha256_of,
    sha256_of_range,
)
from tests.helpers.pool_calls import LIMIT

DATA = random.Random(0).randbytes(12_800_000)  # over three chunks, no two alike


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    yield fd
    os.close(fd)


def test_chunks_fill_the_buffer_in_order(fd):
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
    assert hash_parts(b"", fd, "x") == xxhash.xxh3_128_hexdigest(DATA)


def test_a_file_that_ends_early_is_an_error(fd):
    with pytest.raises(SourceChangedError, match="shorter"):
        list(read_chunks(fd, 0, len(DATA) + 1, "x", memoryview(bytearray(100_000))))


@pytest.fixture(params=[hashing.CHUNK, 1 << 16], ids=["one thread", "two threads"])
def chunk(request, monkeypatch):
    """The bytes of a chunk: with many chunks in a file, another thread reads them."""
    monkeypatch.setattr(hashing, "CHUNK", request.param)
    return request.param


RANGES = [(10, 110), (110, 150), (400, len(DATA) - 100)]
WANTED = {(start, stop): xxhash.xxh3_128_digest(DATA[start:stop]) for start, stop in RANGES}


@pytest.mark.usefixtures("chunk")
def test_one_pass_hashes_the_file_and_each_range(fd):
    ticks: list[int] = []
    hasher = SourceHasher(fd, RANGES, len(DATA), "x", ticks.append)
    found = hasher.finish()
    assert found.sha256 == hashlib.sha256(DATA).hexdigest()
    assert found.fingerprints == WANTED
    assert sum(ticks) == len(DATA)


@pytest.mark.usefixtures("chunk")
def test_bytes_that_the_caller_has_read_are_not_read_again(fd, monkeypatch):
    hasher = SourceHasher(fd, RANGES, len(DATA), "x", lambda _: None)
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


def test_another_head_is_hashed_in_place_of_the_first_bytes(fd):
    head = b"x" * 1000
    assert hash_parts(head, fd, "x") == xxhash.xxh3_128_hexdigest(head + DATA[1000:])
    assert hash_parts(DATA[:1000], fd, "x") == xxhash.xxh3_128_hexdigest(DATA)


def test_the_sha256_of_a_range(fd):
    assert (
        sha256_of_range(fd, (300, 5_000_000), "x") == hashlib.sha256(DATA[300:5_000_000]).digest()
    )
    with pytest.raises(SourceChangedError, match="x: became shorter"):
        sha256_of_range(fd, (0, len(DATA) + 1), "x")


def test_the_sha256_of_bytes_in_memory():
    assert sha256_of(memoryview(b"abc")) == hashlib.sha256(b"abc").digest()


def test_a_failed_read_names_the_file_and_the_reason(fd, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UnreadableFileError, match="x: cannot be read: Input/output error"):
        hash_parts(b"", fd, "x")


def test_a_caller_can_stop_after_any_chunk(fd, chunk):
    def stop(count):
        ticks.append(count)
        raise KeyboardInterrupt

    ticks: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        SourceHasher(fd, (), len(DATA), "x", stop).finish()
    assert ticks == [chunk]
    assert not readers()  # none that reads a descriptor which may be another file's by then


def readers() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("ahead")]


@pytest.mark.usefixtures("chunk")
def test_a_file_that_became_shorter_has_no_hash(fd, tmp_path):
    hasher = SourceHasher(fd, RANGES[:1], len(DATA), "x", lambda _: None)
    hasher.advance(100)
    os.truncate(tmp_path / "x", len(DATA) - 1)
    with pytest.raises(SourceChangedError, match="x: became shorter"):
        hasher.finish()


def test_another_thread_takes_the_next_item():
    takers = []

    def items():
        for number in range(5):
            takers.append(threading.current_thread())
            yield number

    assert list(one_ahead(items())) == list(range(5))
    assert takers[0] is threading.current_thread()
    assert len({*takers[1:]}) == 1
    assert takers[1] is not takers[0]
    assert not readers()


def test_an_error_of_the_next_item_comes_after_those_before():
    def items():
        yield from (1, 2, 3)
        raise OSError("unreadable")

    found = []
    with pytest.raises(OSError, match="unreadable"):
        for each in one_ahead(items()):
            found.append(each)
    assert found == [1, 2, 3]
    assert not readers()


@pytest.mark.parametrize("refusals", [1, 1000])
def test_items_are_complete_though_no_thread_starts(monkeypatch, refusals):
    refused, real = [], threading.Thread.start

    def start(thread):
        if len(refused) < refusals:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert list(one_ahead(iter(range(20)))) == list(range(20))
    assert len(refused) == 1  # it is not asked again


def test_no_chunk_is_overwritten_while_it_is_hashed(fd, monkeypatch):
    ahead, real = threading.Semaphore(0), hashing.read_into

    def read_into(*arguments):
        real(*arguments)
        if threading.current_thread() is not threading.main_thread():
            ahead.release()

    monkeypatch.setattr(hashing, "read_into", read_into)
    hasher, at = SourceHasher(fd, (), len(DATA), "x", lambda _: None), 0
    for chunk in one_ahead(hasher._read_up_to(len(DATA))):  # private: to look at a chunk later
        assert at + len(chunk) == len(DATA) or ahead.acquire(timeout=LIMIT)
        assert chunk == DATA[at : at + len(chunk)]
        at += len(chunk)
    assert at == len(DATA)


def test_the_gaps_between_parts_are_read_in_full_chunks_whatever_the_first_is(fd, monkeypatch):
    reads, real = [], hashing.read_into
    monkeypatch.setattr(hashing, "read_into", lambda *a: reads.append(len(a[1])) or real(*a))
    hasher = SourceHasher(fd, (), len(DATA), "x", lambda _: None)
    hasher.advance(10)
    hasher.advance(20)
    assert hasher.finish().sha256 == hashlib.sha256(DATA).hexdigest()
    assert reads[:2] == [10, 10]
    assert len(reads) == 2 + -(-(len(DATA) - 20) // CHUNK)
