"""Repack the 4-bit words, scales and zeros of each layout into MLX's order. Arrays in, arrays out.

MLX stores a linear of N outputs and K inputs as uint32 (N, K/8): eight consecutive inputs a word,
the lowest nibble first. AutoAWQ stores (K, N/8): eight outputs a word, in the order 0 2 4 6 1 3 5
7. So eight rows of one column of words are an 8 x 8 block of nibbles that must be transposed. Three
rounds of swaps do it (Hacker's Delight, 2nd ed., section 7-3, with nibbles for bits); here for
4 x 4, where two rounds are enough:

    row 0   a b c d     pairs of rows one   a e c g     pairs of rows two   a e i m
    row 1   e f g h     apart: swap         b f d h     apart: swap         b f j n
    row 2   i j k l     b,e d,g j,m l,o     i m k o     cg,im dh,jn         c g k o
    row 3   m n o p                         j n l p                         d h l p

A round is `t = ((low >> shift) ^ high) & mask; high ^= t; low ^= t << shift` on whole arrays of
rows, the shift and the mask's runs being one, two and four nibbles. Where the shift is whole bytes,
reading `low` at that byte offset is the shift, so those rounds take four passes instead of six.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Step = tuple[Callable[..., Any], Array, Any, Array]

_SIDE = 8  # nibbles in a word, so rows in a block
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_STRIPE_BYTES = 8 << 20  # stays in the L3 cache until it is hashed or written
_TILE_BYTES = 1 << 20  # with its scratch 1.5 MB, about an L2 cache; smaller, calls cost more
_L1_ELEMENTS = 16 << 10  # of 2 bytes, 32 KB
_LINE_WORDS = 16  # words in a cache line of 64 bytes
_MIN_LINES = 3  # of a row copied at a time; single lines are slower


def awq_stripes(qweight: Array, first_row: int = 0, last_row: int | None = None) -> Iterator[Array]:
    """Repack AutoAWQ's words as MLX's weight, in stripes of whole rows.

    Args:
        qweight: C-contiguous 32-bit words (K, N/8), K a multiple of 8.
        first_row: The first of the N rows to compute, a multiple of 8, so that threads can share a
            matrix.
        last_row: Where to end, a multiple of 8; by default N.

    Yields:
        The next rows, uint32 (rows, K/8), rows a multiple of 8, about 8 MB. All stripes of a call
        share one buffer, so each is valid until the next.

    Raises:
        ValueError: K or a row is not a multiple of 8, or a row is out of range.
    """
    words = qweight.view(np.uint32)
    inputs, columns = words.shape
    last_row = _SIDE * columns if last_row is None else last_row
    if not inputs or inputs % _SIDE:
        raise ValueError(f"expected a multiple of {_SIDE} inputs, found {inputs}")
    if first_row % _SIDE or last_row % _SIDE or not 0 <= first_row <= last_row <= _SIDE * columns:
        raise ValueError(
            f"expected multiples of {_SIDE} up to {_SIDE * columns}, found {first_row}:{last_row}"
        )
    words = words[:, first_row // _SIDE : last_row // _SIDE]
    width = max(1, min(_tile_columns(inputs), words.shape[1]))
    buffer, tile = _workspace(inputs, width)
    for first in range(0, words.shape[1], width):
        part = words[:, first : first + width]
        stripe = buffer[: part.size].reshape(-1, inputs // _SIDE)
        _transpose(part, stripe, tile)
        yield stripe


def _tile_columns(inputs: int) -> int:
    """Return the words in a row of a tile, which are the columns of a stripe."""
    lines = _STRIPE_BYTES // (4 * _LINE_WORDS * inputs)
    # odd: steps of a power of two would use only some sets of the L1 cache
    return (max(lines, _MIN_LINES) | 1) * _LINE_WORDS


def _workspace(inputs: int, width: int) -> tuple[Array, Array]:
    """Allocate a stripe, uint32, and a tile with its scratch, uint32 (1.5 tiles).

    One allocation for both, because numpy requests huge pages from 4 MB on.
    """
    pitch = width + width % 2  # the arithmetic is on pairs of words
    blocks = max(1, min(inputs // _SIDE, _TILE_BYTES // (4 * _SIDE * pitch)))
    tile = _SIDE * blocks * pitch * 3 // 2
    space = np.empty(_LINE_WORDS + tile + width * inputs, np.uint32)
    space = space[-(space.ctypes.data // 4) % _LINE_WORDS :]  # align to a cache line
    return space[tile:], space[:tile]


def _transpose(words: Array, rows: Array, space: Array) -> None:
    """Write `words` (K, columns) as MLX's `rows` (8 * columns, K/8), tile by tile."""
    inputs, columns = words.shape
    pitch = columns + columns % 2
    # A tile is (2, 2, 2, blocks, columns): the bits of a row's number in its block, lowest first,
    # which gives the round of six passes the longest runs.
    blocks = words.reshape(-1, 2, 2, 2, columns).transpose(3, 2, 1, 0, 4)
    # Row b0 + 2 b1 + 4 b2 of a transposed block is output 2 b0 + 4 b1 + b2 of AutoAWQ's order.
    outputs = rows.reshape(columns, 2, 2, 2, -1).transpose(2, 1, 3, 4, 0)
    depth = len(space) // (_SIDE * pitch * 3 // 2)
    steps: list[Step] = []
    tile = space[:0]
    for first in range(0, inputs // _SIDE, depth):
        part = blocks[:, :, :, first : first + depth]
        if tile.shape[:-1] != part.shape[:-1]:
            size = _SIDE * part.shape[3] * pitch
            flat, scratch = space[:size], space[size : size * 3 // 2]
            steps = _swaps(flat.view(np.uint64), scratch.view(np.uint64))
            tile = flat.reshape(*part.shape[:-1], pitch)
        tile[..., :columns] = part
        for operation, left, right, out in steps:
            operation(left, right, out=out)
        for row in np.ndindex(2, 2, 2):
            outputs[row][first : first + depth] = tile[row][:, :columns]


def _swaps(tile: Array, scratch: Array) -> list[Step]:
    """List the passes that transpose the blocks of a tile, as (operation, left, right, out)."""
    low, high = tile.reshape(2, -1)
    steps: list[Step] = [
        (np.right_shift, low, np.uint64(4), scratch),
        (np.bitwise_xor, scratch, high, scratch),
        (np.bitwise_and, scratch, np.uint64(0x0F0F_0F0F_0F0F_0F0F), scratch),
        (np.bitwise_xor, high, scratch, high),
        (np.left_shift, scratch, np.uint64(4), scratch),
        (np.bitwise_xor, low, scratch, low),
    ]
    for pairs, mask in ((2, 0x00FF_00FF_00FF_00FF), (4, 0x0000_FFFF_0000_FFFF)):
        shift = pairs // 2  # bytes
        halves = tile.view(np.uint8).reshape(pairs, 2, -1)
        low, high = halves[:, 0, shift:], halves[:, 1, :-shift]
        swap = scratch.view(np.uint8).reshape(pairs, -1)[:, :-shift]
        steps += [
            (np.bitwise_xor, low, high, swap),
            (np.bitwise_and, scratch, np.uint64(mask), scratch),  # clears the bytes left over
            (np.bitwise_xor, high, swap, high),
            (np.bitwise_xor, low, swap, low),
        ]
    return steps


def awq_zeros(qzeros: Array) -> Array:
    """Unpack AutoAWQ's zero points.

    Args:
        qzeros: Packed 32-bit words (K/G, N/8).

    Returns:
        The zero points, uint8 (K/G, N).
    """
    groups, columns = qzeros.shape
    zeros = np.empty((groups, columns, _SIDE), np.uint8)
    words = qzeros.view(np.uint32)
    for nibble, output in enumerate(_AWQ_ORDER):
        zeros[:, :, output] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
    return zeros.reshape(groups, columns * _SIDE)


def awq_biases(scales: Array, qzeros: Array) -> Array:
    """Compute MLX's biases, -(scale * zero), rounded once.

    The product of a float16 and a 4-bit integer is exact in float32. A zero point of 0 gives -0.0.

    Args:
        scales: float16 or float32 (K/G, N).
        qzeros: Packed zero points (K/G, N/8).

    Returns:
        The biases, float16 (N, K/G).
    """
    biases = np.empty(scales.shape[::-1], np.float16)
    for first, last in _column_tiles(scales):
        product = awq_zeros(qzeros[:, first // _SIDE : last // _SIDE]).astype(np.float32)
        product *= scales[:, first:last]
        np.negative(product, out=product)
        biases[first:last] = product.astype(np.float16).T
    return biases


def group_scales(scales: Array) -> Array:
    """Transpose scales that are stored by group.

    Args:
        scales: float16 or float32 (K/G, N).

    Returns:
        MLX's scales, float16 (N, K/G).
    """
    transposed = np.empty(scales.shape[::-1], np.float16)
    for first, last in _column_tiles(scales):
        transposed[first:last] = scales[:, first:last].astype(np.float16).T
    return transposed


def _column_tiles(array: Array) -> Iterator[tuple[int, int]]:
    """Divide columns into runs, each a multiple of 8, whose transposition stays in the L1 cache."""
    rows, columns = array.shape
    width = max(_L1_ELEMENTS // max(rows, 1) // 32, 1) * 32
    for first in range(0, columns, width):
        yield first, min(first + width, columns)


def native_biases(scaled_zeros: Array) -> Array:
    """Compute MLX's biases of the PARO_NATIVE layout.

    Args:
        scaled_zeros: scale * zero, (K/G, N).

    Returns:
        The biases, float16 (N, K/G).
    """
    return group_scales(-scaled_zeros)


def legacy_weight(qweight: Array) -> Array:
    """Repack the words of the PARO_NATIVE_LEGACY layout as MLX's weight.

    TinyChat's interleave: 64 int16 hold 64 inputs of four outputs, 16 int16 for each output; in
    every 32 inputs, input c is nibble 8*((c % 8) // 2) + 4*(c % 2) + c // 8. So byte i of MLX's
    word w is nibbles w and w + 4 of stored word i.

    Args:
        qweight: int16 (N/4, K), K a multiple of 64.

    Returns:
        The weight, uint32 (N, K/8).
    """
    quarter, inputs = qweight.shape
    weight = np.empty((quarter, 4 * inputs // _SIDE), np.uint32)
    rows = max(1, _TILE_BYTES // (8 * inputs))  # fits the L2 cache with its temporaries
    for first in range(0, quarter, rows):
        part = qweight[first : first + rows]
        blocks = part.reshape(len(part), inputs // 64, 4, 16).swapaxes(1, 2)
        words = blocks.copy().view(np.uint32)
        for distance, mask in ((8, 0x0000_FF00), (4, 0x00F0_00F0)):  # 01234567 -> 04152637
            swap = words >> np.uint32(distance)
            swap ^= words
            swap &= np.uint32(mask)
            words ^= swap
            swap <<= np.uint32(distance)
            words ^= swap
        stored = words.view(np.uint8).reshape(-1, 4, 4)
        target = weight[first : first + rows].view(np.uint8).reshape(-1, 4, 4)
        for word, byte in np.ndindex(4, 4):
            target[:, word, byte] = stored[:, byte, word]
    return weight.reshape(4 * quarter, inputs // _SIDE)


def legacy_group_rows(array: Array, groups: int) -> Array:
    """Drop the padding rows of a PARO_NATIVE_LEGACY array.

    Args:
        array: (rows, N), at least `groups` rows.
        groups: K/G, the rows that are not padding.

    Returns:
        The array, (K/G, N).
    """
    return array[:groups]
