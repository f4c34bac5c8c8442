"""A new file: whole blocks past the page cache, the rest through it, all of it or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import random

import pytest
import xxhash

from paroquant_stream.errors import StoreError
from paroquant_stream.files import atomic_file, new_file, temp_files
from paroquant_stream.files.folder import Folder
from paroquant_stream.files.new_file import NewFile
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
    """What lies under the published name, written in chunks from memory that is used again."""
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
    """os.<name> answers EINVAL to what asks for whole blocks, the first `times` times."""
    real, fired = getattr(os, name), []

    def call(where, what, *rest, **options):
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
def test_whole_blocks_go_past_the_page_cache_and_the_rest_through_it(tmp_path, monkeypatch):
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
def test_a_file_system_that_refuses_whole_blocks_is_written_through_the_cache(
    tmp_path, monkeypatch, name
):
    fired = refuse(monkeypatch, name)
    data = random.Random(0).randbytes(30_000)
    assert write(tmp_path, data) == data
    assert fired == [name]


def test_an_error_of_the_writing_thread_reaches_the_caller(tmp_path, monkeypatch):
    def full(_fd, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match="No space left on device; 30,000 bytes needed"):
        write(tmp_path, bytes(30_000))
    assert os.listdir(tmp_path / "tmp") == os.listdir(tmp_path / "entries") == []


def test_a_file_that_is_given_up_waits_for_the_block_on_its_way(tmp_path, monkeypatch):
    import threading

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
    import mmap

    real, made = mmap.mmap, []
    monkeypatch.setattr(mmap, "mmap", lambda *a: made.append(a) or real(*a))
    write(tmp_path, bytes(100 * 4096))
    assert 1 <= len(made) <= new_file._BLOCKS + 1


def test_a_trace_shows_the_writes(tmp_path):
    trace = Trace()
    file = new(tmp_path, 5000, trace=trace)
    file.write(memoryview(bytes(5000)))
    publish(file, tmp_path)
    file.discard()
    assert [span.stage for span in trace.spans] == ["write", "write"]


def test_no_sweep_of_another_thread_can_see_a_temp_that_is_not_known_as_open(tmp_path, monkeypatch):
    real, known = atomic_file._create, []

    def create(folder, name, *rest, **options):
        known.append(temp_files.is_open(name))
        return real(folder, name, *rest, **options)

    monkeypatch.setattr(atomic_file, "_create", create)
    new(tmp_path, 10).discard()
    assert known == [True]

    def fail(_folder, name, *_, **__):
        known.append(name)
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr(atomic_file, "_create", fail)
    with pytest.raises(StoreError):
        new(tmp_path, 10)
    assert not temp_files.is_open(known[-1])
