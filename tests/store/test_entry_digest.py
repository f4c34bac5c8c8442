"""The digest of an entry: the same however its bytes are read, another for every change."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections import deque

import pytest
import xxhash

from paroquant_stream.errors import SourceChangedError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.store import entry_digest
from paroquant_stream.store.entry_digest import (
    BlockHasher,
    EntryHasher,
    hash_entry,
    is_tree,
    tree_digest,
    tree_digest_of,
)
from paroquant_stream.store.manifest import DIGEST_FORM
from tests.helpers.pool_calls import LIMIT

SPECS = [
    TensorSpec("a", "U8", (8192,)),  # two blocks
    TensorSpec("b", "U8", (5000,)),
    TensorSpec("c", "U8", (0,)),
    TensorSpec("d", "U8", (100,)),
]
HEADER, TENSORS = lay_out(SPECS)
DATA = HEADER + random.Random(0).randbytes(TENSORS[-1].stop - len(HEADER))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(entry_digest, "BLOCK", 4096)
    monkeypatch.setattr(entry_digest, "_RANGE", 4096)


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    fd = os.open(tmp_path / "x", os.O_RDWR)
    yield fd
    os.close(fd)


def expected() -> str:
    """The digest as the module's docstring defines it."""
    top = xxhash.xxh3_128_digest(HEADER)
    for tensor in TENSORS:
        for at in range(tensor.start, tensor.stop, 4096):
            top += xxhash.xxh3_128_digest(DATA[at : min(at + 4096, tensor.stop)])
    return "tree:" + xxhash.xxh3_128_hexdigest(top)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("span", [4096, 3 * 4096])
def test_the_digest_is_of_the_digests_of_its_blocks(fd, monkeypatch, threads, span):
    monkeypatch.setattr(entry_digest, "_RANGE", span)
    assert hash_entry(fd, TENSORS, "x", "tree:", threads) == expected()


def test_the_size_of_a_block_on_disk_never_changes(monkeypatch):
    monkeypatch.undo()
    assert entry_digest.BLOCK == 1 << 20


@pytest.mark.parametrize("threads", [1, 3])
def test_a_digest_of_an_earlier_version_is_of_all_bytes(fd, threads):
    flat = xxhash.xxh3_128_hexdigest(DATA)
    assert hash_entry(fd, TENSORS, "x", "0" * 32, threads) == flat


@pytest.mark.parametrize("chunk", [1, 100, 4096, 10_000])
def test_the_chunks_of_a_tensor_do_not_matter(chunk):
    hasher = BlockHasher()
    data = memoryview(DATA)[:9000]
    for at in range(0, 9000, chunk):
        hasher.update(data[at : min(at + chunk, 9000)])
    blocks = [DATA[at : min(at + 4096, 9000)] for at in range(0, 9000, 4096)]
    assert hasher.finish() == b"".join(map(xxhash.xxh3_128_digest, blocks))


def test_an_entry_that_is_copied_has_both_digests():
    for like, digest in (("tree:", expected()), ("f" * 32, xxhash.xxh3_128_hexdigest(DATA))):
        hasher = EntryHasher(HEADER)
        for tensor in TENSORS:
            hasher.update(memoryview(DATA)[tensor.start : tensor.stop])
            hasher.end_tensor()
        assert hasher.digest(like) == digest


@pytest.mark.parametrize("like", ["tree:", "0" * 32])
def test_every_change_is_another_digest(fd, like):
    found = {hash_entry(fd, TENSORS, "x", like)}
    edges = {place for t in TENSORS for place in (t.start - 1, t.start, t.stop - 1)}
    places = edges | set(range(0, len(DATA), 997))
    for at in places:
        os.pwrite(fd, bytes([DATA[at] ^ 1]), at)
        found.add(hash_entry(fd, TENSORS, "x", like))
        os.pwrite(fd, DATA[at : at + 1], at)
    os.pwrite(fd, b"m", len(DATA))  # longer
    found.add(hash_entry(fd, TENSORS, "x", like))
    sizes = {0, 1, len(HEADER) - 1, len(HEADER), len(DATA) - 1} | {t.start for t in TENSORS}
    for size in sorted(sizes, reverse=True):
        os.truncate(fd, size)
        found.add(hash_entry(fd, TENSORS, "x", like))
    assert len(found) == 1 + len(places) + 1 + len(sizes)


def test_blocks_that_are_exchanged_are_another_digest(fd):
    first, second = DATA[TENSORS[0].start :][:4096], DATA[TENSORS[0].start + 4096 :][:4096]
    os.pwrite(fd, second + first, TENSORS[0].start)
    assert hash_entry(fd, TENSORS, "x", "tree:") != expected()


def test_an_entry_without_tensors_has_a_digest(tmp_path):
    header, tensors = lay_out([])
    (tmp_path / "x").write_bytes(header)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    assert hash_entry(fd, tensors, "x", "tree:") == tree_digest(header, b"")
    os.close(fd)


def test_a_known_digest_is_checked_by_the_reading_that_replaces_it(fd):
    flat = xxhash.xxh3_128_hexdigest(DATA)
    assert tree_digest_of(fd, TENSORS, "x", flat) == expected()
    assert tree_digest_of(fd, TENSORS, "x", expected()) == expected()
    os.pwrite(fd, bytes([DATA[-1] ^ 1]), len(DATA) - 1)
    assert tree_digest_of(fd, TENSORS, "x", flat) is None
    assert tree_digest_of(fd, TENSORS, "x", expected()) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_an_entry_that_becomes_shorter_is_an_error(fd, monkeypatch, threads):
    real = os.preadv

    def shrink(*arguments):
        os.ftruncate(fd, len(HEADER))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", shrink)
    with pytest.raises(SourceChangedError, match="x: became shorter"):
        hash_entry(fd, TENSORS, "x", "tree:", threads)


def test_the_form_tells_both_kinds_from_anything_else():
    flat, tree = "0" * 32, "tree:" + "0" * 32
    assert (is_tree(flat), is_tree(tree)) == (False, True)
    assert DIGEST_FORM.fullmatch(flat)
    assert DIGEST_FORM.fullmatch(tree)
    for wrong in ("", "tree:", "0" * 31, "0" * 37, "tree:" + "0" * 31, "TREE:" + "0" * 32):
        assert not DIGEST_FORM.fullmatch(wrong)


def test_a_range_is_whole_blocks(monkeypatch):
    monkeypatch.undo()
    assert entry_digest._RANGE % entry_digest.BLOCK == 0  # private: else its digests differ


BLOCK = 4096
BUFFER = memoryview(bytearray(2 * BLOCK))
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK + 7)


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("size", SIZES)
def test_a_range_has_the_digests_that_its_bytes_have(tmp_path, size, start):
    data = random.Random(size).randbytes(start + size + 50)
    (tmp_path / "x").write_bytes(data)
    hasher = BlockHasher()
    hasher.update(memoryview(data)[start : start + size])
    with (tmp_path / "x").open("rb") as file:  # private: `hash_entry` would need such tensors
        found = entry_digest._hash_range(file.fileno(), "x", BUFFER, (start, start + size))
    assert found == hasher.finish()
    assert len(found) == 16 * -(-size // BLOCK)


def test_a_read_is_of_whole_blocks_and_within_a_range(monkeypatch):
    monkeypatch.undo()
    assert entry_digest._READ % entry_digest.BLOCK == 0
    assert entry_digest._RANGE % entry_digest._READ == 0


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_range_that_the_file_has_not_is_an_error(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size - 1))
    with (tmp_path / "x").open("rb") as file, pytest.raises(SourceChangedError, match=r"^x: "):
        entry_digest._hash_range(file.fileno(), "x", BUFFER, (0, size))  # private: as above


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_of_a_verification_ends_every_thread(fd, monkeypatch, threads):
    cleared, begun, real = threading.Event(), itertools.count(), entry_digest.read_into

    class Ranges(deque):
        def clear(self):
            super().clear()
            cleared.set()

    def read_into(*arguments):
        if next(begun) == 0:
            raise KeyboardInterrupt
        assert cleared.wait(LIMIT)  # none is faster than the interrupt
        real(*arguments)

    monkeypatch.setattr(entry_digest, "deque", Ranges)
    monkeypatch.setattr(entry_digest, "read_into", read_into)
    with pytest.raises(KeyboardInterrupt):
        hash_entry(fd, TENSORS, "x", "tree:", threads)
    assert next(begun) <= threads  # of five ranges, each thread had one


@pytest.mark.parametrize("started", [0, 1])
def test_with_fewer_threads_the_digest_is_the_same(fd, monkeypatch, started):
    asked, real = [], threading.Thread.start

    def start(thread):
        asked.append(thread.name)
        if len(asked) > started:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert hash_entry(fd, TENSORS, "x", "tree:", 4) == expected()
    assert 1 <= len(asked) <= started + 1  # one that is done already is not followed by another


def test_an_error_of_the_only_thread_that_started_is_raised(fd, monkeypatch):
    """Else the ranges that it left would have no digest."""
    asked, started, main = [], threading.Thread.start, threading.main_thread()
    real, failed = entry_digest.read_into, threading.Event()

    def start(thread):
        asked.append(thread)
        if len(asked) > 1:
            assert failed.wait(LIMIT)
            raise RuntimeError("can't start new thread")
        started(thread)

    def read_into(*arguments):
        if threading.current_thread() is not main:
            failed.set()
            raise SourceChangedError("x: became shorter")
        real(*arguments)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(entry_digest, "read_into", read_into)
    with pytest.raises(SourceChangedError, match="x: became shorter"):
        hash_entry(fd, TENSORS, "x", "tree:", 4)
