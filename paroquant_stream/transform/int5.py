"""Repack the five-bit words of the INT5_BITPLANE layout. Arrays in, arrays out.

The four low bits of a code lie in AutoAWQ's words, the fifth of output n in bit n % 32 of word
n // 32 of a plane. MLX stores a row of codes as one stream of bits, the lowest bit first: eight
codes are five bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .repack import Array, awq_zeros

_BITS = 5
_PLANE_OUTPUTS = 32  # outputs in a word of the plane
_STRIPE_ELEMENTS = 1 << 19  # 4 MB of the 64-bit words in which eight codes are joined


def int5_codes(words: Array, plane: Array) -> Array:
    """Join low bits and fifth bits.

    Args:
        words: Low bits in AutoAWQ's packing, 32-bit words (rows, N/8).
        plane: Fifth bits, 32-bit words (rows, N/32).

    Returns:
        The codes, uint8 (rows, N).
    """
    codes = awq_zeros(words)
    fifth = np.unpackbits(np.ascontiguousarray(plane).view(np.uint8), axis=1, bitorder="little")
    codes |= fifth << np.uint8(_BITS - 1)
    return codes


def int5_stripes(qweight: Array, plane: Array) -> Iterator[Array]:
    """Repack the weight of a linear as MLX's, in stripes of whole rows.

    Args:
        qweight: Low bits, 32-bit words (K, N/8), K a multiple of 32.
        plane: Fifth bits, 32-bit words (K, N/32).

    Yields:
        The next rows, uint32 (rows, 5K/32).
    """
    inputs, words = plane.shape
    step = max(1, _STRIPE_ELEMENTS // inputs // (_PLANE_OUTPUTS // 8))
    for first in range(0, words, step):
        low = qweight[:, 4 * first : 4 * (first + step)]
        codes = int5_codes(low, plane[:, first : first + step]).T
        joined = np.zeros((len(codes), inputs // 8), np.uint64)
        for place in range(8):
            joined |= codes[:, place::8].astype(np.uint64) << np.uint64(_BITS * place)
        streams = joined.view(np.uint8).reshape(len(codes), -1, 8)[:, :, :_BITS]
        yield np.ascontiguousarray(streams).reshape(len(codes), -1).view(np.uint32)


def int5_biases(scales: Array, zeros: Array) -> Array:
    """Compute MLX's biases, -(scale * zero), rounded once; a zero point of 0 gives -0.0.

    Args:
        scales: float16 (K/G, N).
        zeros: The zero points, uint8 (K/G, N).

    Returns:
        The biases, float16 (N, K/G).
    """
    product = zeros.astype(np.float32) * scales  # exact: 11 and 5 bits
    return np.ascontiguousarray((-product).astype(np.float16).T)
