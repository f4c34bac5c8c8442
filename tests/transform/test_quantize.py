"""Rows are quantized to the bits of `mx.quantize` on the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.transform import quantize
from paroquant_stream.transform.quantize import is_finite, keeps_subnormals, quantize_rows

NOT_FINITE = {"F16": 0x7C00, "BF16": 0x7F80}
"""The exponent bits of infinities and NaNs."""


def by_mlx(stored: np.ndarray, dtype: str, group_size: int, bits: int) -> list[bytes]:
    weight = mx.array(stored)
    if dtype == "BF16":
        weight = weight.view(mx.bfloat16, stream=mx.cpu)
    results = mx.quantize(weight, group_size, bits, stream=mx.cpu)
    return [bytes(memoryview(result.view(mx.uint8, stream=mx.cpu))) for result in results]


def any_bits(dtype: str, seed: int) -> np.ndarray:
    """All finite values, however small or large, as often as they have bit patterns."""
    words = np.random.default_rng(seed).integers(0, 2**16, (64, 1024), dtype=np.uint16)
    mask = NOT_FINITE[dtype]
    words[(words & mask) == mask] &= 0xFFFF ^ mask
    return words.view(np.float16) if dtype == "F16" else words


def like_weights(dtype: str, scale: float) -> np.ndarray:
    """Normal values, and rows of one sign, of zeros, of one value and of pairs that cancel."""
    values = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    values *= np.float32(scale)
    values[0] = 0
    values[1] = np.abs(values[1])
    values[2] = -values[1]
    values[3] = scale
    values[4, ::2] = -values[4, 1::2]
    values[5, ::128] *= 15
    values[6] = -0.0
    if dtype == "BF16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.filterwarnings("error")
def test_any_finite_values_get_the_bits_of_mlx(dtype, group_size, bits):
    for seed in range(3):
        stored = any_bits(dtype, seed)
        found = quantize_rows(stored, dtype, group_size, bits)
        assert [array.tobytes() for array in found] == by_mlx(stored, dtype, group_size, bits)


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 2e-5, 0.03, 1.0, 900.0])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_weights_get_the_bits_of_mlx(dtype, scale):
    stored = like_weights(dtype, scale)
    for bits in (4, 8):
        found = quantize_rows(stored, dtype, 64, bits)
        assert [array.tobytes() for array in found] == by_mlx(stored, dtype, 64, bits)


def test_the_shapes_are_those_of_mlx():
    weight, scales, biases = quantize_rows(like_weights("F16", 1.0), "F16", 128, 4)
    assert (weight.shape, weight.dtype) == ((64, 128), np.uint32)
    assert scales.shape == biases.shape == (64, 8)


def test_a_tile_smaller_than_a_row_changes_nothing(monkeypatch):
    stored = like_weights("F16", 0.03)
    expected = [array.tobytes() for array in quantize_rows(stored, "F16", 64, 4)]
    for tile in (1, 1024, 3000):
        monkeypatch.setattr(quantize, "_TILE", tile)  # private: no result depends on it
        assert [a.tobytes() for a in quantize_rows(stored, "F16", 64, 4)] == expected


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    stored = like_weights(dtype, 1.0)
    assert is_finite(stored, dtype)
    wide = np.float32(value)
    stored[63, 1023] = wide.view(np.uint32) >> np.uint32(16) if dtype == "BF16" else wide
    assert not is_finite(stored, dtype)


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
@pytest.mark.slow
def test_a_library_that_flushes_subnormals_changes_no_bit(tmp_path):
    """Linked with -ffast-math, a library tells the processor to take subnormal numbers for zero."""
    (tmp_path / "x.c").write_text("void nothing(void) {}")
    library = str(tmp_path / "x.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-ffast-math", "-o", library, tmp_path / "x.c"])
    code = """if True:
        import ctypes, sys, numpy as np
        from paroquant_stream.transform.quantize import keeps_subnormals
        from tests.helpers.operations import quantized
        values = (np.random.default_rng(0).standard_normal((64, 64)) * 1e-6).astype(np.float16)
        before = quantized(values)
        ctypes.CDLL(sys.argv[1])
        print(keeps_subnormals(), quantized(values) == before)
    """
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


def test_this_processor_keeps_subnormals():
    assert keeps_subnormals()
