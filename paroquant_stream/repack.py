"""Nibble arithmetic: 4-bit words, scales and zeros of each layout into MLX's order. Arrays in,
arrays out.

MLX keeps a linear of N outputs and K inputs as uint32 (N, K/8): eight consecutive inputs a word,
the lowest nibble first. AutoAWQ keeps (K, N/8): eight outputs a word, in the order 0 2 4 6 1 3 5 7.
So eight rows of one column are an 8 x 8 block of nibbles that must be transposed:

    row k     ........        distance 1: swap nibbles of rows 0,1 | 2,3 | 4,5 | 6,7
    row k+1   ........        distance 2: swap nibble pairs of rows 0,2 | 1,3 | 4,6 | 5,7
      ...                     distance 4: swap halves of rows 0,4 | 1,5 | 2,6 | 3,7
    row k+7   ........        (Hacker's Delight, 2nd ed., section 7-3, with nibbles for bits)

Two columns are read as one uint64 and sixteen rows at once; a fourth swap, of 32-bit halves at
distance 8, then leaves the two words of one output side by side, so that the last step moves 8-byte
items.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ROWS = 16  # inputs of a block: two words of one output
_TILE_BLOCKS, _TILE_COLUMNS = 64, 64  # 512 KB and half as much scratch: stays in a 1 MB L2 cache
_STAGES = (
    (1, 0x0F0F_0F0F_0F0F_0F0F),
    (2, 0x00FF_00FF_00FF_00FF),
    (4, 0x0000_FFFF_0000_FFFF),
    (8, 0x0000_0000_FFFF_FFFF),
)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_OUTPUTS = tuple(8 * (row // 8) + _AWQ_ORDER[row % 8] for row in range(_ROWS))
"""Which of a uint64 column's 16 outputs a row of a transposed block is."""


def awq_stripes(qweight: Array) -> Iterator[Array]:
    """Runs of whole rows of MLX's weight, in order, each valid until the next is asked for.

    `qweight`: C-contiguous 32-bit words (K, N/8), K a multiple of 16. Each stripe: uint32 (rows,
    K/8), rows a multiple of 8, at most 1024 (4 MB for K = 8192); no array of the output's size is
    made. Raises ValueError for another K.
    """
    inputs, columns = qweight.shape
    if inputs % _ROWS:
        raise ValueError(f"expected a multiple of {_ROWS} inputs, found {inputs}")
    blocks = inputs // _ROWS
    words = qweight.view(np.uint32).reshape(blocks, _ROWS, columns)
    stripe = np.empty((min(_TILE_COLUMNS, -(-columns // 2)), _ROWS, blocks), np.uint64)
    height, breadth = min(_TILE_BLOCKS, blocks), len(stripe)
    space = np.empty(_ROWS * height * breadth * 3 // 2, np.uint64)
    for first in range(0, columns, 2 * _TILE_COLUMNS):
        part = words[:, :, first : first + 2 * _TILE_COLUMNS]
        width = part.shape[2]
        for start in range(0, blocks, _TILE_BLOCKS):
            rows = part[start : start + _TILE_BLOCKS]
            shape = (_ROWS, len(rows), -(-width // 2))
            size = shape[0] * shape[1] * shape[2]
            tile, scratch = space[:size].reshape(shape), space[size : size * 3 // 2]
            if width % 2:
                tile[:, :, -1] = 0
            tile.view(np.uint32)[:, :, :width] = rows.transpose(1, 0, 2)
            _transpose_nibbles(tile, scratch)
            for row, output in enumerate(_OUTPUTS):
                stripe[: tile.shape[2], output, start : start + len(rows)] = tile[row].T
        # An odd number of columns leaves the second half of the last uint64 column empty.
        yield stripe.reshape(-1, blocks).view(np.uint32)[: 8 * width]


def _transpose_nibbles(tile: Array, scratch: Array) -> None:
    """Transposes every 16 x 2 block of words of `tile`, uint64 (16, blocks, columns), in place.

    `scratch`: uint64, half as many items.
    """
    for distance, mask in _STAGES:
        pairs = tile.reshape(_ROWS // (2 * distance), 2, distance, *tile.shape[1:])
        low, high = pairs[:, 0], pairs[:, 1]
        swap = scratch.reshape(low.shape)
        shift = np.uint64(4 * distance)
        np.right_shift(low, shift, out=swap)
        np.bitwise_xor(swap, high, out=swap)
        np.bitwise_and(swap, np.uint64(mask), out=swap)
        np.bitwise_xor(high, swap, out=high)
        np.left_shift(swap, shift, out=swap)
        np.bitwise_xor(low, swap, out=low)


def awq_weight(qweight: Array) -> Array:
    """MLX's whole weight, uint32 (N, K/8), of AutoAWQ's `qweight` (K, N/8)."""
    return np.concatenate([stripe.copy() for stripe in awq_stripes(qweight)])


def awq_zeros(qzeros: Array) -> Array:
    """Zero points, uint8 (K/G, N), of AutoAWQ's packed 32-bit `qzeros` (K/G, N/8)."""
    groups, columns = qzeros.shape
    zeros = np.empty((groups, columns, 8), np.uint8)
    words = qzeros.view(np.uint32)
    for nibble, output in enumerate(_AWQ_ORDER):
        zeros[:, :, output] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
    return zeros.reshape(groups, columns * 8)


def awq_biases(scales: Array, qzeros: Array) -> Array:
    """MLX's biases, float16 (N, K/G): -(scale * zero) rounded once, so a zero point of 0 gives
    -0.0.

    `scales`: float16 (K/G, N). `qzeros`: packed (K/G, N/8). A float16 times a 4-bit integer is
    exact in float32.
    """
    product = scales.astype(np.float32) * awq_zeros(qzeros)
    return np.ascontiguousarray((-product).astype(np.float16).T)


def group_scales(scales: Array) -> Array:
    """MLX's scales (N, K/G) of scales stored by group, (K/G, N); the dtype stays."""
    return np.ascontiguousarray(scales.T)


def native_biases(scaled_zeros: Array) -> Array:
    """MLX's biases, float16 (N, K/G), of PARO_NATIVE's `scaled_zeros` = +scale * zero, (K/G, N)."""
    return np.ascontiguousarray(-scaled_zeros.T)


def native_weight(qweight: Array) -> Array:
    """MLX's weight, uint32 (N, K/8), of PARO_NATIVE's int16 (N/4, K): the same bytes, nothing
    copied.

    The four nibbles of an int16 are four consecutive inputs of one output.
    """
    quarter, inputs = qweight.shape
    return qweight.reshape(-1).view(np.uint32).reshape(4 * quarter, inputs // 8)


def legacy_weight(qweight: Array) -> Array:
    """MLX's weight, uint32 (N, K/8), of PARO_NATIVE_LEGACY's int16 (N/4, K), K a multiple of 64.

    TinyChat's interleave: 64 int16 hold 64 inputs of four outputs, 16 int16 an output; in every 32
    inputs, input c lies in nibble 8*((c % 8) // 2) + 4*(c % 2) + c // 8.
    """
    quarter, inputs = qweight.shape
    blocks = qweight.reshape(quarter, inputs // 64, 4, 16).swapaxes(1, 2)
    words = np.ascontiguousarray(blocks).view(np.uint32).reshape(4 * quarter, inputs // 32, 4)
    order = np.array([8 * (c % 8 // 2) + 4 * (c % 2) + c // 8 for c in range(32)])
    result = np.zeros_like(words)
    for column, slot in enumerate(order):
        nibble = (words[:, :, slot // 8] >> np.uint32(4 * (slot % 8))) & np.uint32(15)
        result[:, :, column // 8] |= nibble << np.uint32(4 * (column % 8))
    return result.reshape(4 * quarter, inputs // 8)
