"""Slices have the bits that MLX slices, read from a file without the bytes between them."""

from __future__ import annotations

import itertools
import os

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers import distributed

from paroquant_stream.distributed import slices
from paroquant_stream.distributed.slices import Slice, rank_slice, read_slice
from paroquant_stream.errors import MalformedFileError, UnreadableFileError
from paroquant_stream.files.tensor_header import DTYPE_BYTES, TensorInfo

START = 100
"""Offset of the tensor in the file; it need not be aligned."""


class Rank:
    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


@pytest.fixture
def stored(tmp_path):
    """Write random bytes as a tensor; return its descriptor, its record and its array."""
    opened = []

    def store(dtype, shape):
        tensor = TensorInfo("x", dtype, shape, START, START)
        count = tensor.nbytes
        data = np.random.default_rng(0).bytes(count)
        if dtype == "BOOL":
            data = bytes(byte & 1 for byte in data)
        path = tmp_path / "file"
        path.write_bytes(b"\xff" * START + data + b"\xff" * 100)
        opened.append(os.open(path, os.O_RDONLY))
        words = np.frombuffer(data, f"u{DTYPE_BYTES[dtype]}").reshape(shape)
        array = mx.array(words).view(slices.MLX_DTYPES[dtype])
        return opened[-1], TensorInfo("x", dtype, shape, START, START + count), array

    yield store
    for fd in opened:
        os.close(fd)


@pytest.fixture
def bytes_read(monkeypatch):
    """Record the number of bytes of each read."""
    counts = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])
    return counts


def same_bits(found, expected):
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and mx.array_equal(found.view(mx.uint8), expected.view(mx.uint8))
    )


@pytest.mark.parametrize("segments", [1, 3, [0.5], [0.25, 0.75], [4, 16]], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_rank_has_the_slice_that_mlx_gives_it(segments, axis):
    array = mx.arange(48 * 96).reshape(48, 96)
    for count, rank in [(2, 0), (2, 1), (4, 3)]:
        predicate = lambda _, __: (axis, segments)  # noqa: E731
        expected = distributed._shard({"x": array}, predicate, Rank(rank, count))["x"]
        found = rank_slice(array.shape, axis, segments, rank, count).of(array)
        assert mx.array_equal(found, expected)


@pytest.mark.parametrize("segments", [1, 5, [10], [0.4], [28], [16, 8]], ids=str)
def test_a_segment_that_does_not_divide_is_refused(segments):
    with pytest.raises(ValueError, match=r"divide over 4 ranks|equal segments"):
        rank_slice((26, 7), 0, segments, 0, 4)


def test_a_slice_of_groups_is_scaled_to_channels():
    assert Slice(1, ((1, 2), (4, 6))).scaled(32) == Slice(1, ((32, 64), (128, 192)))


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("axis", [0, 1])
def test_every_dtype_keeps_its_bits(stored, dtype, axis):
    """The random bits contain NaNs with many payloads."""
    fd, tensor, array = stored(dtype, (16, 24))
    part = rank_slice(tensor.shape, axis, 2, 1, 2)
    assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))


@pytest.mark.parametrize("piece", [0, 1 << 30], ids=["pieces", "whole rows"])
@pytest.mark.parametrize(
    ("shape", "segments"),
    [((12,), 1), ((12, 30), 1), ((12, 24), [4, 16]), ((6, 12, 12), 3), ((6, 6, 6, 2), 1)],
    ids=str,
)
def test_any_axis_of_any_shape_is_read_alike(stored, monkeypatch, shape, segments, piece):
    monkeypatch.setattr(slices, "_MIN_PIECE", piece)  # private: for both ways to read
    monkeypatch.setattr(slices, "_CHUNK", 100)  # private: for several chunks of rows
    fd, tensor, array = stored("F16", shape)
    tried = 0
    for axis, count in itertools.product(range(len(shape)), (1, 2, 3)):
        for rank in range(count):
            try:
                part = rank_slice(shape, axis, segments, rank, count)
            except ValueError:
                continue  # this axis does not divide
            tried += 1
            assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))
    assert tried >= 3


def test_an_empty_tensor_has_empty_slices(stored):
    for shape in [(0, 4), (4, 0)]:
        fd, tensor, array = stored("F16", shape)
        for axis in (0, 1):
            part = rank_slice(shape, axis, 1, 0, 2)
            assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))


def test_a_slice_of_rows_is_one_read_of_its_own_bytes(stored, bytes_read):
    fd, tensor, array = stored("U32", (512, 300))
    part = rank_slice(tensor.shape, 0, 1, 1, 4)
    assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))
    assert bytes_read == [tensor.nbytes // 4]


def test_large_pieces_are_read_alone(stored, bytes_read):
    """In a stack of experts, a rank's outputs of each expert are one piece."""
    fd, tensor, array = stored("U32", (4, 512, 128))
    part = rank_slice(tensor.shape, 1, 1, 0, 2)
    assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))
    assert bytes_read == [tensor.nbytes // 8] * 4


def test_small_pieces_are_cut_from_whole_rows(stored, bytes_read):
    fd, tensor, array = stored("U32", (3000, 512))
    part = rank_slice(tensor.shape, 1, 1, 1, 2)
    assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))
    assert bytes_read == [4 << 20, tensor.nbytes - (4 << 20)]


def test_a_short_read_is_continued(stored, monkeypatch):
    fd, tensor, array = stored("F16", (8, 8))
    preadv, calls = os.preadv, []
    monkeypatch.setattr(
        os, "preadv", lambda fd, b, at: calls.append(at) or preadv(fd, [b[0][:5]], at)
    )
    part = rank_slice(tensor.shape, 0, 1, 1, 2)
    assert same_bits(read_slice(fd, tensor, part, "file"), part.of(array))
    assert calls == list(range(START + 64, START + 128, 5))


def test_a_file_that_ends_too_early_is_an_error(stored, tmp_path):
    fd, tensor, _ = stored("F16", (512, 512))
    os.truncate(tmp_path / "file", START + 1000)
    with pytest.raises(MalformedFileError, match="file: ends"):
        read_slice(fd, tensor, rank_slice(tensor.shape, 0, 1, 1, 2), "file")


def test_a_failed_read_is_an_error(stored, monkeypatch):
    fd, tensor, _ = stored("F16", (8, 8))
    called = []

    def fail(*_):
        called.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UnreadableFileError, match="file: cannot be read: Input/output error"):
        read_slice(fd, tensor, rank_slice(tensor.shape, 0, 1, 1, 2), "file")
    assert called


def test_a_slice_does_not_keep_the_whole_array_alive():
    whole = mx.ones((1024, 1024))
    mx.eval(whole)
    part = rank_slice(whole.shape, 0, 1, 0, 2).of(whole)
    before = mx.get_active_memory()
    mx.eval(part)
    del whole
    assert mx.get_active_memory() <= before - part.nbytes + 100_000
