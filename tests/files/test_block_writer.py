"""Bytes at any offsets of a file: in full blocks, by a thread, with O_DIRECT where it can be."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files import block_writer
from paroquant_stream.files.block_writer import PENDING, BlockWriter
from paroquant_stream.trace import Trace

pytestmark = pytest.mark.usefixtures("small_blocks")
DIRECT = getattr(os, "O_DIRECT", 0)
needs_direct = pytest.mark.skipif(not DIRECT, reason="this system has no O_DIRECT")
PAGE = 4096


@contextmanager
def writer_to(path, size: int, *more) -> Iterator[BlockWriter]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    writer = BlockWriter(fd, partial(os.open, path), path, size, *more)
    try:
        yield writer
    finally:
        writer.close()
        os.close(fd)


def write(path, data: bytes, pieces: list[tuple[int, int]]) -> bytes:
    """Write slices of data from one buffer that is reused, and return what the file holds."""
    with writer_to(path, len(data)) as writer:
        memory = bytearray(max((stop - start for start, stop in pieces), default=0))
        for start, stop in pieces:
            memory[: stop - start] = data[start:stop]
            writer.write(memoryview(memory)[: stop - start], start)
            memory[:] = bytes(len(memory))
        writer.flush()
        assert writer.written == len(data)
    return path.read_bytes()


def in_chunks(bounds: list[int], chunk: int) -> list[list[tuple[int, int]]]:
    """Cut the ranges between bounds into chunks, a list for each range."""
    return [
        [(at, min(at + chunk, stop)) for at in range(start, stop, chunk)]
        for start, stop in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("chunk", [1000, PAGE, 10_000])
@pytest.mark.parametrize("streams", [1, 2, 3, 5])
def test_places_are_written_in_turn(tmp_path, streams, chunk):
    data = random.Random(streams).randbytes(60_001)
    bounds = [len(data) * i // streams for i in range(streams + 1)]
    ranges = in_chunks(bounds, chunk)
    turns = [r.pop(0) for _ in range(len(data)) for r in ranges if r]
    assert write(tmp_path / "x", data, turns) == data


def test_places_are_written_in_any_order(tmp_path):
    data = random.Random(0).randbytes(60_001)
    pieces = in_chunks([0, len(data)], 1234)[0]
    random.Random(1).shuffle(pieces)
    assert write(tmp_path / "x", data, pieces) == data


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 1])
def test_files_of_any_size_are_written(tmp_path, size):
    data = random.Random(size).randbytes(size)
    assert write(tmp_path / "x", data, [(0, size)]) == data


def test_a_large_chunk_without_o_direct_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(block_writer, "_DIRECT", 0)
    monkeypatch.setattr(block_writer, "_LARGE", 8000)
    monkeypatch.setattr(mmap, "mmap", lambda *_: pytest.fail("a block was made"))
    data = random.Random(2).randbytes(16_000)
    assert write(tmp_path / "x", data, [(8000, 16_000), (0, 8000)]) == data


@pytest.mark.parametrize("first", [100, PAGE + 5])
def test_a_large_chunk_after_a_small_one_keeps_their_order(tmp_path, monkeypatch, first):
    monkeypatch.setattr(block_writer, "_DIRECT", 0)
    monkeypatch.setattr(block_writer, "_LARGE", 8000)
    data = random.Random(3).randbytes(30_000)
    assert write(tmp_path / "x", data, [(0, first), (first, 20_000), (20_000, 30_000)]) == data


def noted(monkeypatch) -> list[tuple[int, int, bool]]:
    """Offset, length and whether O_DIRECT was used, of each write."""
    real, seen = os.pwrite, []

    def note(fd, data, at):
        seen.append((at, len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT)))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", note)
    return seen


@needs_direct
def test_full_blocks_are_written_with_o_direct(tmp_path, monkeypatch):
    seen = noted(monkeypatch)
    write(tmp_path / "x", bytes(10_000), [(0, 3000), (3000, 10_000)])
    if not any(direct for *_, direct in seen):
        pytest.skip("this file system has no O_DIRECT")
    assert seen == [(0, PAGE, True), (PAGE, PAGE, True), (2 * PAGE, 1808, False)]


@needs_direct
def test_a_block_between_disk_blocks_is_written_without(tmp_path, monkeypatch):
    seen = noted(monkeypatch)
    data = random.Random(4).randbytes(3 * PAGE)
    assert write(tmp_path / "x", data, [(1, 3 * PAGE), (0, 1)]) == data
    assert not any(direct for *_, direct in seen)


@needs_direct
@pytest.mark.parametrize("name", ["open", "pwrite"])
def test_a_file_system_without_o_direct_is_written_all_the_same(tmp_path, monkeypatch, name):
    real, fired = getattr(os, name), []

    def call(where, what, *rest, **options):
        direct = what & DIRECT if name == "open" else fcntl.fcntl(where, fcntl.F_GETFL) & DIRECT
        if direct:
            fired.append(name)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(where, what, *rest, **options)

    monkeypatch.setattr(os, name, call)
    data = random.Random(0).randbytes(30_000)
    before = len(os.listdir("/dev/fd"))
    assert write(tmp_path / "x", data, in_chunks([0, 30_000], 3000)[0]) == data
    assert fired == [name]  # it is not asked again
    assert len(os.listdir("/dev/fd")) == before


@needs_direct
def test_another_error_of_opening_again_is_an_error(tmp_path, monkeypatch):
    real = os.open

    def call(where, flags, *rest, **options):
        if flags & DIRECT:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(where, flags, *rest, **options)

    monkeypatch.setattr(os, "open", call)
    with pytest.raises(StoreError, match="Too many open files"):
        write(tmp_path / "x", bytes(PAGE), [(0, PAGE)])


def test_an_error_of_the_thread_reaches_the_caller(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"No space left on device; 30\.0 kB needed"):
        write(tmp_path / "x", bytes(30_000), [(0, 30_000)])


def test_a_closed_writer_has_waited_for_the_block_being_written(tmp_path, monkeypatch):
    real, go, written = os.pwrite, threading.Event(), []

    def slow(fd, data, at):
        go.wait(5)
        os.fstat(fd)  # fails if it was closed meanwhile
        written.append(len(data))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    with writer_to(tmp_path / "x", 30_000) as writer:
        writer.write(memoryview(bytes(3 * PAGE)), 0)
        threading.Timer(0.05, go.set).start()
    assert written in ([PAGE], [PAGE] * 2)  # those in the queue are dropped


def test_no_more_than_a_few_blocks_are_in_memory(tmp_path, monkeypatch):
    real, made = mmap.mmap, []
    monkeypatch.setattr(mmap, "mmap", lambda *a: made.append(a) or real(*a))
    size = 99 * PAGE
    ranges = in_chunks([0, size // 3, 2 * size // 3, size], 1000)
    turns = [r.pop(0) for _ in range(size) for r in ranges if r]
    write(tmp_path / "x", bytes(size), turns)
    assert 1 <= len(made) <= PENDING + 3 + 1


def test_a_trace_has_a_stage_for_each_write(tmp_path):
    trace = Trace()
    with writer_to(tmp_path / "x", 5000, trace) as writer:
        writer.write(memoryview(bytes(5000)), 0)
        writer.flush()
    assert [span.stage for span in trace.spans] == ["write", "write"]


def test_a_block_that_was_written_short_is_finished(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    data = random.Random(1).randbytes(10_000)
    assert write(tmp_path / "x", data, [(0, 10_000)]) == data


@pytest.mark.parametrize(("size", "number"), [(PAGE, errno.EIO), (100, errno.EINVAL)])
def test_other_errors_are_not_tried_again(tmp_path, monkeypatch, size, number):
    """EINVAL is the refusal of O_DIRECT alone."""
    calls = []

    def fail(_fd, data, _at):
        calls.append(len(data))
        raise OSError(number, "bad")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StoreError, match="bad"):
        write(tmp_path / "x", bytes(size), [(0, size)])
    assert calls == [size]


def test_numbers_are_written_as_their_bytes(tmp_path):
    with writer_to(tmp_path / "x", 8) as writer:
        writer.write(memoryview(bytes(8)).cast("I"), 0)
        writer.flush()
        assert writer.written == 8


@pytest.mark.parametrize("blocks", [0, 2])
def test_without_more_threads_blocks_are_written_by_the_caller(tmp_path, monkeypatch, blocks):
    """The system starts no thread, or the program ends while some blocks are still to come."""
    data, real = random.Random(5).randbytes(30_000), ThreadPoolExecutor.submit
    calls = []

    def submit(self, *call):
        calls.append(call)
        if len(calls) > blocks:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return real(self, *call)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    assert write(tmp_path / "x", data, in_chunks([0, 30_000], 3000)[0]) == data
    assert len(calls) == blocks + 1  # it is not asked again
