"""The arrays of an entry get the bytes that are written to its file, in any order, or none."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from paroquant_stream.backends.dtypes import MLX_DTYPES
from paroquant_stream.files.tensor_header import TensorInfo, TensorSpec
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.model import entry_arrays
from paroquant_stream.model.entry_arrays import EntryArrays

SPECS = [
    *(TensorSpec(f"matrix.{dtype}", dtype, (3, 5)) for dtype in MLX_DTYPES),
    *(TensorSpec(f"number.{dtype}", dtype, ()) for dtype in MLX_DTYPES),
    TensorSpec("stack", "U32", (2, 64, 32)),
    TensorSpec("same", "BF16", (3, 5)),
    TensorSpec("empty", "F16", (0, 4)),
]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def made(tmp_path, specs):
    """Return the tensors and the bytes of a file with random bits; its bools are 0 or 1."""
    header, tensors = lay_out(specs)
    data = bytearray(header)
    for tensor in tensors:
        found = random.Random(tensor.name).randbytes(tensor.nbytes)
        data += bytes(b & 1 for b in found) if tensor.dtype == "BOOL" else found
    path = tmp_path / "entry.safetensors"
    path.write_bytes(data)
    return tensors, data, mx.load(str(path))


def pieces(tensors: list[TensorInfo], size: int) -> list[tuple[int, int]]:
    """Return ranges of a file, each in one tensor, in random order."""
    found = [
        (start, min(start + size, tensor.stop))
        for tensor in tensors
        for start in range(tensor.start, tensor.stop, size)
    ]
    random.Random(size).shuffle(found)
    return found


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_they_are_what_mlx_reads_from_the_file(tmp_path, threads, size):
    specs = SPECS if size > 1 else [spec for spec in SPECS if spec.nbytes < 1000]
    tensors, data, expected = made(tmp_path, specs)
    arrays = EntryArrays(tensors, threads)
    buffer = bytearray(size)  # used again for every piece, as by a conversion
    for start, stop in pieces(tensors, size):
        buffer[: stop - start] = data[start:stop]
        arrays.put(start, memoryview(buffer)[: stop - start])
    found = arrays.take()
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert bytes(memoryview(array)) == bytes(memoryview(expected[name]))


def test_while_a_byte_is_missing_there_are_none(tmp_path, threads):
    tensors, data, _ = made(tmp_path, SPECS)
    arrays = EntryArrays(tensors, threads)
    (start, stop), *rest = pieces(tensors, 1 << 20)
    for first, last in rest:
        arrays.put(first, memoryview(data)[first:last])
    arrays.put(start, memoryview(data)[start : stop - 1])
    assert arrays.take() is None
    arrays.put(stop - 1, memoryview(data)[stop - 1 : stop])
    assert arrays.take()


def test_a_closed_one_allocates_no_more_and_gives_nothing(tmp_path, monkeypatch):
    tensors, data, _ = made(tmp_path, SPECS)
    allocated = []
    monkeypatch.setattr(entry_arrays.mx, "zeros", lambda *a: allocated.append(a))
    closed = threading.Event()
    with ThreadPoolExecutor(1) as one:
        one.submit(closed.wait)
        arrays = EntryArrays(tensors, one)
        arrays.close()
        closed.set()
        for start, stop in pieces(tensors, 1 << 20):
            arrays.put(start, memoryview(data)[start:stop])
    assert not allocated
    assert arrays.take() is None


def test_without_memory_the_writing_goes_on(tmp_path, threads, monkeypatch):
    def allow(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("[malloc] Unable to allocate")
        return real(*arguments)

    tensors, data, _ = made(tmp_path, SPECS)
    held = mx.get_active_memory()
    real, left = mx.zeros, [3]
    monkeypatch.setattr(entry_arrays.mx, "zeros", allow)
    arrays = EntryArrays(tensors, threads)
    for start, stop in pieces(tensors, 1 << 20):
        arrays.put(start, memoryview(data)[start:stop])
    assert arrays.is_closed
    assert arrays.take() is None
    threads.shutdown()
    assert mx.get_active_memory() == held  # what was allocated is free again
