"""Quantize rows as `mx.quantize` does on the CPU, bit for bit, at twice its rate and without MLX.

For each group of G values w, in float32 (mlx/backend/cpu/quantized.cpp), n = 2^bits - 1:

    scale = max((max w - min w) / n, 1e-7), negative where |min w| <= |max w|
    edge  = the one of min w and max w that has the larger magnitude, max w if they are equal
    q     = round(edge / scale)
    scale, bias = (edge / q, edge) if q != 0 else (scale, 0)
    code  = min(max(round((w - bias) / scale), 0), n)

CPU and GPU round halves differently, and entries must not depend on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .cast import to_bfloat16

Array = npt.NDArray[Any]
_TILE = 128 << 10  # values; in float32 half of an L2 cache; smaller, calls cost more
_SMALLEST = np.float32(1e-7)
_TWO_112 = np.float32(2.0**112)
_SUBNORMAL = np.float32(1e-40)


def quantize_rows(
    stored: Array, dtype: str, group_size: int, bits: int
) -> tuple[Array, Array, Array]:
    """Quantize rows of an embedding.

    Args:
        stored: (rows, columns) of float16 or float32, or bfloat16 as uint16; finite.
        dtype: "F16", "BF16" or "F32".
        group_size: Values that share a scale; divides the columns.
        bits: 4 or 8 for each value.

    Returns:
        MLX's weight, uint32 (rows, columns * bits / 32), its scales and its biases, each
        (rows, columns / group_size) of `dtype`.
    """
    rows, columns = stored.shape
    groups = columns // group_size
    weight = np.empty((rows, columns * bits // 8), np.uint8)
    scales, biases = np.empty((2, rows, groups), np.float32)
    step = max(_TILE // columns, 1)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        wide = _widen(stored[part], dtype).reshape(-1, group_size)
        scale, bias = _scales(wide, bits)
        scales[part], biases[part] = scale.reshape(-1, groups), bias.reshape(-1, groups)
        weight[part] = _codes(wide, scale, bias, bits).reshape(-1, columns * bits // 8)
    return weight.view(np.uint32), _narrow(scales, dtype), _narrow(biases, dtype)


def keeps_subnormals() -> bool:
    """Return whether the processor computes with subnormal numbers in this thread.

    A library that was linked with -ffast-math tells it to take them for zero.
    """
    return bool(_SUBNORMAL * np.float32(1))


def is_finite(stored: Array, dtype: str) -> bool:
    """Return whether no value is infinite or a NaN."""
    if dtype == "F32":
        return bool(np.isfinite(stored).all())
    exponent = 0x7C00 if dtype == "F16" else 0x7F80
    magnitudes = stored.view(np.uint16) & np.uint16(0x7FFF)
    return int(magnitudes.max(initial=0)) < exponent


def _widen(stored: Array, dtype: str) -> Array:
    """Return new float32 values.

    Of a float16 sign, exponent and fraction are moved to their places in a float32, whose exponent
    is then 112 too small. numpy's own conversion takes six times as long.
    """
    if dtype == "F32":
        return stored.astype(np.float32)
    if dtype == "BF16":
        words = stored.astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
    signed = stored.view(np.int16).astype(np.int32)
    signed <<= np.int32(13)
    signed &= np.int32(-0x7000_2000)  # 0x8FFF_E000
    wide = signed.view(np.float32)
    wide *= _TWO_112
    return wide


def _scales(wide: Array, bits: int) -> tuple[Array, Array]:
    """Return scale and bias of each group, float32."""
    low, high = wide.min(1), wide.max(1)
    with np.errstate(over="ignore"):
        scale = high - low
    scale /= np.float32(2**bits - 1)
    np.maximum(scale, _SMALLEST, out=scale)
    is_low = np.abs(low) > np.abs(high)
    np.negative(scale, out=scale, where=~is_low)
    edge = np.where(is_low, low, high)
    count = np.rint(edge / scale)
    some = count != 0
    np.divide(edge, count, out=scale, where=some)
    return scale, np.where(some, edge, np.float32(0))


def _codes(wide: Array, scale: Array, bias: Array, bits: int) -> Array:
    """Return the codes, packed into bytes with the first in the lowest bits; `wide` is used up."""
    wide -= bias[:, None]
    wide /= scale[:, None]
    np.rint(wide, out=wide)
    whole = wide.astype(np.int16 if bits == 8 else np.int8)  # at most one beyond the range
    np.clip(whole, 0, 2**bits - 1, out=whole)
    if bits == 8:
        return whole.astype(np.uint8)
    pairs = whole.view(np.uint16)
    return (pairs | pairs >> np.uint16(4)).astype(np.uint8)


def _narrow(values: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return to_bfloat16(values)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])
