"""Files written in one stream, hashed and published atomically."""

from __future__ import annotations

import errno
import os
import random

import pytest
import xxhash

from paroquant_stream.errors import StoreError
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


@pytest.mark.parametrize("chunk", [1000, 4096, 10_000, 60_000])
@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_those_that_were_written(tmp_path, size, chunk):
    data = random.Random(size).randbytes(size)
    assert write(tmp_path, data, chunk) == data


def test_an_error_of_the_writer_thread_reaches_the_caller(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"No space left on device; 30\.0 kB needed"):
        write(tmp_path, bytes(30_000))
    assert os.listdir(tmp_path / "tmp") == os.listdir(tmp_path / "entries") == []


def test_a_trace_has_a_stage_for_each_write(tmp_path):
    trace = Trace()
    file = new(tmp_path, 5000, trace=trace)
    file.write(memoryview(bytes(5000)))
    publish(file, tmp_path)
    file.discard()
    assert [span.stage for span in trace.spans] == ["write", "write"]


def test_a_block_that_was_written_short_is_finished(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    data = random.Random(1).randbytes(10_000)
    assert write(tmp_path, data) == data


@pytest.mark.parametrize("size", [9_999, 10_001])
def test_a_file_with_fewer_or_more_bytes_is_not_published(tmp_path, size):
    file = new(tmp_path, size)
    file.write(memoryview(bytes(10_000)))
    with pytest.raises(StoreError, match=f"10,000 bytes written, {size:,} expected"):
        publish(file, tmp_path)
    file.discard()
    assert os.listdir(tmp_path / "tmp") == os.listdir(tmp_path / "entries") == []


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
