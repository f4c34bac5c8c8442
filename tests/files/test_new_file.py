"""Files written in one stream: full blocks with O_DIRECT, the rest without, atomically."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading

import pytest
import xxhash

from paroquant_stream.errors import StoreError
from paroquant_stream.files import new_file
from paroquant_stream.files.folder import Folder
from paroquant_stream.files.new_file import NewFile, new_file_at
from paroquant_stream.trace import Trace

pytestmark = pytest.mark.usefixtures("small_blocks")
SIZES = [0, 1, 4095, 4096, 4097, 8192, 5 * 4096, 50_001]


def new(tmp_path, size, **options) -> NewFile:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    (tmp_path / "entries").mkdir(exist_ok=True)
    return NewFile(Folder.open(tmp_path / "tmp"), f"temp{random.random()}", size, 0o600, **options)


def publish(file: NewFile, tmp_path) -> None:
    with Folder.open(tmp_path / "entries") as folder:
        file.publish(folder, "entry")


def write(tmp_path, data: bytes, chunk: int = 3000) -> bytes:
    """Write data in chunks from one buffer; return the content of the published file."""
    file = new(tmp_path, len(data))
    target = tmp_path / "entries" / "entry"
    try:
        memory = bytearray(chunk)
        for start in range(0, len(data), chunk):
            part = data[start : start + chunk]
            memory[: len(part)] = part
            file.write(memoryview(memory)[: len(part)])
            memory[:] = bytes(chunk)
        publish(file, tmp_path)
        assert file.digest == xxhash.xxh3_128(data).hexdigest()
    finally:
        file.discard()
    assert os.listdir(tmp_path / "tmp") == []
    return target.read_bytes()


def refuse(monkeypatch, name: str, times: int = 1) -> list[str]:
    """Let os.<name> refuse O_DIRECT with EINVAL, the first `times` times."""
    real, fired = getattr(os, name), []

    def call(where, what, *rest, **options):
        # private: the same question that the writer asks
        fd_direct = name == "write" and new_file._is_direct(where)
        if (fd_direct or (name == "open" and what & new_file._DIRECT)) and len(fired) < times:
            fired.append(name)
            if name == "open":
                os.close(real(where, what & ~new_file._DIRECT, *rest, **options))  # as Linux does
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(where, what, *rest, **options)

    monkeypatch.setattr(os, name, call)
    return fired


@pytest.mark.parametrize("chunk", [1000, 4096, 10_000, 60_000])
@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_those_that_were_written(tmp_path, size, chunk):
    data = random.Random(size).randbytes(size)
    assert write(tmp_path, data, chunk) == data


@pytest.mark.skipif(not new_file._DIRECT, reason="this system has no O_DIRECT")
def test_full_blocks_are_written_with_o_direct(tmp_path, monkeypatch):
    real, seen = os.write, []

    def note(fd, data):
        seen.append((len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & new_file._DIRECT)))
        return real(fd, data)

    monkeypatch.setattr(os, "write", note)
    write(tmp_path, bytes(10_000))
    if not any(direct for _, direct in seen):
        pytest.skip("this file system has no O_DIRECT")
    assert seen == [(4096, True), (4096, True), (1808, False)]


@pytest.mark.skipif(not new_file._DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.parametrize("name", ["open", "write"])
def test_a_file_system_without_o_direct_is_written_all_the_same(tmp_path, monkeypatch, name):
    fired = refuse(monkeypatch, name)
    data = random.Random(0).randbytes(30_000)
    assert write(tmp_path, data) == data
    assert fired == [name]


def test_an_error_of_the_writer_thread_reaches_the_caller(tmp_path, monkeypatch):
    def full(_fd, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match=r"No space left on device; 30\.0 kB needed"):
        write(tmp_path, bytes(30_000))
    assert os.listdir(tmp_path / "tmp") == os.listdir(tmp_path / "entries") == []


def test_a_discarded_file_waits_for_the_block_being_written(tmp_path, monkeypatch):
    real, go, written = os.write, threading.Event(), []

    def slow(fd, data):
        go.wait(5)
        os.fstat(fd)  # fails if it was closed meanwhile
        written.append(len(data))
        return real(fd, data)

    monkeypatch.setattr(os, "write", slow)
    file = new(tmp_path, 30_000)
    file.write(memoryview(bytes(5000)))
    threading.Timer(0.05, go.set).start()
    file.discard()
    assert written == [4096]
    assert os.listdir(tmp_path / "tmp") == []


def test_no_more_than_a_few_blocks_are_in_memory(tmp_path, monkeypatch):
    real, made = mmap.mmap, []
    monkeypatch.setattr(mmap, "mmap", lambda *a: made.append(a) or real(*a))
    write(tmp_path, bytes(100 * 4096))
    assert 1 <= len(made) <= new_file._BLOCKS + 1


def test_a_trace_has_a_stage_for_each_write(tmp_path):
    trace = Trace()
    file = new(tmp_path, 5000, trace=trace)
    file.write(memoryview(bytes(5000)))
    publish(file, tmp_path)
    file.discard()
    assert [span.stage for span in trace.spans] == ["write", "write"]


def test_a_block_that_was_written_short_is_finished(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    data = random.Random(1).randbytes(10_000)
    assert write(tmp_path, data) == data


def test_other_errors_of_a_write_are_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def fail(_fd, data):
        calls.append(len(data))
        raise OSError(errno.EINVAL if len(calls) > 1 else errno.EIO, "bad")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StoreError, match="bad"):
        write(tmp_path, bytes(4096))
    assert calls == [4096]


@pytest.mark.parametrize("size", [9_999, 10_001])
def test_a_file_with_fewer_or_more_bytes_is_not_published(tmp_path, size):
    file = new(tmp_path, size)
    file.write(memoryview(bytes(10_000)))
    with pytest.raises(StoreError, match=f"10,000 bytes written, {size:,} expected"):
        publish(file, tmp_path)
    file.discard()
    assert os.listdir(tmp_path / "tmp") == os.listdir(tmp_path / "entries") == []


def test_a_lost_write_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda _fd, data: len(data))
    with pytest.raises(StoreError, match="0 bytes written, 5,000 expected"):
        write(tmp_path, bytes(5000))


def test_a_full_disk_is_an_error_of_the_store_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StoreError, match=r"No space left on device; 5\.0 kB needed"):
        new(tmp_path, 5000)
    assert os.listdir(tmp_path / "tmp") == []


def test_a_file_outside_a_store_is_published_after_the_body(tmp_path):
    with new_file_at(tmp_path / "x", 5) as file:
        file.write(memoryview(b"hello"))
        assert file.size == 5
        (temp,) = os.listdir(tmp_path)
        assert temp.startswith(".x.")
    assert (tmp_path / "x").read_bytes() == b"hello"
    assert os.listdir(tmp_path) == ["x"]


def test_a_body_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), new_file_at(tmp_path / "x", 5) as file:
        file.write(memoryview(b"hello"))
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_file_in_an_absent_directory_is_an_error_of_the_store(tmp_path):
    with (
        pytest.raises(StoreError, match="absent/x: No such file or directory"),
        new_file_at(tmp_path / "absent" / "x", 5),
    ):
        pytest.fail("the body ran")


def test_einval_without_o_direct_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def fail(_fd, data):
        calls.append(len(data))
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StoreError, match="Invalid argument"):
        write(tmp_path, bytes(100))
    assert calls == [100]
