"""An entry whose pieces are written in any order: published once every byte was written once."""

from __future__ import annotations

import errno
import os
import random
import stat

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.store import entry_digest
from paroquant_stream.store.entry_digest import hash_entry
from paroquant_stream.store.entry_file import EntryFile, Piece, piece_writer
from paroquant_stream.trace import Trace
from tests.helpers.stores import KEY, temps

SPECS = [
    TensorSpec("a", "U8", (8192,)),
    TensorSpec("b", "U8", (9000,)),
    TensorSpec("e", "U8", (0,)),
    TensorSpec("c", "U8", (100,)),
]
BLOCK = 4096
DATA = random.Random(0).randbytes(20_000)
pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(entry_digest, "BLOCK", BLOCK)


def piece(file: EntryFile, start: int, stop: int, chunk: int = 1000) -> list[Piece]:
    """Write a range of the entry in a writer of its own, as a unit does."""
    base = file.tensors[0].start
    with piece_writer(file.path, stop - start) as writer:
        for at in range(start, stop, chunk):
            writer.write(start, memoryview(DATA)[at - base : min(at + chunk, stop) - base])
        return writer.finish(sync=False)


def places(file: EntryFile) -> list[tuple[int, int]]:
    """Cut the tensors at blocks."""
    return [
        (at, min(at + BLOCK, tensor.stop))
        for tensor in file.tensors
        for at in range(tensor.start, tensor.stop, BLOCK)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_pieces_in_any_order_are_the_entry(store, seed):
    with store.new_entry(SPECS) as file:
        cuts = places(file)
        random.Random(seed).shuffle(cuts)
        for start, stop in cuts:
            file.add(piece(file, start, stop))
        stamp = store.publish_entry(file, KEY)
    data = store.entry_path(KEY).read_bytes()
    header = file.tensors[0].start
    assert data[header:] == DATA[: file.size - header]
    assert stamp.size == file.size == len(data)
    fd = store.open_entry(KEY)
    assert hash_entry(fd, file.tensors, "x", "tree:") == file.digest == store.entry_digest(KEY)
    os.close(fd)
    assert temps(store) == []


def test_a_writer_may_fill_several_pieces_in_turn(store):
    with store.new_entry(SPECS) as file:
        base = file.tensors[0].start
        tensors = [tensor for tensor in file.tensors if tensor.nbytes]
        with piece_writer(file.path, file.size) as writer:
            for at in range(0, 9000, 300):
                for tensor in tensors:
                    stop = min(at + 300, tensor.nbytes)
                    chunk = DATA[tensor.start - base + at : tensor.start - base + stop]
                    writer.write(tensor.start, memoryview(chunk))
            file.add(writer.finish(sync=False))
        store.publish_entry(file, KEY)
    assert store.entry_path(KEY).read_bytes()[base:] == DATA[: file.size - base]


def test_a_piece_that_is_lost_is_never_published(store):
    for lost in range(5):
        with store.new_entry(SPECS) as file:
            pieces = [p for place in places(file) for p in piece(file, *place)]
            file.add(pieces[:lost] + pieces[lost + 1 :])
            with pytest.raises(AssertionError, match=r"a piece at|bytes were written"):
                store.publish_entry(file, KEY)
    assert store.entry_size(KEY) is None
    assert store.entry_digest(KEY) is None
    assert temps(store) == []


@pytest.mark.parametrize("change", [-1, 1])
def test_pieces_that_overlap_or_end_early_are_never_published(store, change):
    for wrong in range(5):
        with store.new_entry(SPECS) as file:
            pieces = [p for place in places(file) for p in piece(file, *place)]
            found = pieces[wrong]
            pieces[wrong] = Piece(found.start, found.size + change, found.blocks)
            file.add(pieces)
            with pytest.raises(AssertionError, match=r"a piece at|bytes were written"):
                store.publish_entry(file, KEY)
    assert store.entry_size(KEY) is None


def test_a_piece_that_is_written_twice_is_never_published(store):
    with store.new_entry(SPECS) as file:
        pieces = [p for place in places(file) for p in piece(file, *place)]
        file.add(pieces)
        again = piece(file, *places(file)[1])
        with pytest.raises(AssertionError, match="twice"):
            file.add(again)


def test_an_entry_without_tensors_is_published(store):
    with store.new_entry([]) as file:
        store.publish_entry(file, KEY)
    assert store.entry_size(KEY) == file.size


def test_an_entry_that_is_not_published_leaves_no_files(store):
    with pytest.raises(RuntimeError), store.new_entry(SPECS) as file:
        file.add(piece(file, *places(file)[0]))
        raise RuntimeError
    assert temps(store) == []


def test_a_writer_of_a_run_that_has_ended_is_an_error(store):
    with store.new_entry(SPECS) as file:
        pass
    with pytest.raises(StoreError, match="No such file"), piece_writer(file.path, 1):
        pytest.fail("opened")


def test_a_link_in_place_of_the_temp_file_is_not_followed(store, tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    with store.new_entry(SPECS) as file:
        file.path.unlink()
        file.path.symlink_to(tmp_path / "victim")
        with pytest.raises(StoreError), piece_writer(file.path, 1):
            pytest.fail("opened")
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("sync", [False, True])
def test_only_another_host_syncs_its_pieces(store, monkeypatch, sync):
    with store.new_entry(SPECS) as file, piece_writer(file.path, file.size) as writer:
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", calls.append)
            writer.finish(sync)
        assert len(calls) == sync


def test_a_sync_that_fails_is_an_error(store, monkeypatch):
    def fail(_fd):
        raise OSError(errno.EIO, "Input/output error")

    with store.new_entry(SPECS) as file, piece_writer(file.path, file.size) as writer:
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="Input/output"):
            patch.setattr(os, "fsync", fail)
            writer.finish(sync=True)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_call_publishes_nothing(store, monkeypatch, call, number):
    def fail(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    with store.new_entry(SPECS) as file:
        for place in places(file):
            file.add(piece(file, *place))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreError, match=os.strerror(number)):
                store.publish_entry(file, KEY)
    assert store.entry_size(KEY) is None
    assert temps(store) == []


def test_a_full_disk_in_a_writer_is_an_error_of_the_store(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.new_entry(SPECS) as file:
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left"):
            patch.setattr(os, "pwrite", full)
            piece(file, *places(file)[0])


def test_a_full_disk_shows_before_the_work(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left"), store.new_entry(SPECS):
        pytest.fail("the body ran")
    assert temps(store) == []


def test_the_header_is_written_whole_by_short_writes(store, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:50], at))
    with store.new_entry(SPECS) as file:
        for place in places(file):
            file.add(piece(file, *place))
        store.publish_entry(file, KEY)
    fd = store.open_entry(KEY)
    assert hash_entry(fd, file.tensors, "x", "tree:") == file.digest
    os.close(fd)


def test_the_name_is_given_after_the_bytes_are_durable(store, monkeypatch):
    calls = []
    real_fsync, real_replace, real_pwrite = os.fsync, os.replace, os.pwrite

    def fsync(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            calls.append("fsync")
        real_fsync(fd)

    with store.new_entry(SPECS) as file:
        for place in places(file):
            file.add(piece(file, *place))
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "pwrite", lambda *a: calls.append("write") or real_pwrite(*a))
        monkeypatch.setattr(
            os, "replace", lambda *a, **k: calls.append("name") or real_replace(*a, **k)
        )
        store.publish_entry(file, KEY)
    assert calls == ["write", "fsync", "name"] * 2  # its digest file, then the entry


def test_a_trace_has_the_writes(store):
    trace = Trace()
    with store.new_entry(SPECS) as file, piece_writer(file.path, 100, trace) as writer:
        writer.write(file.tensors[0].start, memoryview(b"x" * 100))
        writer.finish(sync=False)
    assert [span.stage for span in trace.spans] == ["write"]


def test_a_copy_gets_each_chunk_with_its_offset(store):
    given = []

    class Copy:
        def put(self, offset, chunk):
            given.append((offset, bytes(chunk)))

    with store.new_entry(SPECS) as file, piece_writer(file.path, 5, copy=Copy()) as writer:
        writer.write(10, memoryview(b"abc"))
        writer.write(20, memoryview(b"x"))
        writer.write(10, memoryview(b"d"))
    assert given == [(10, b"abc"), (20, b"x"), (13, b"d")]
