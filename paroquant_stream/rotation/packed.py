"""The tables of the Metal and CUDA kernels, which rotate the pairs of a round in parallel."""

from __future__ import annotations

from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .tables import Rounds

_HALF = 16
"""So many channels in a row lie in the same half of 128 bytes, the next ones in the other."""


class Tables(NamedTuple):
    """One word and two coefficients per pair and round: 12 bytes, so 48 per channel for krot 8.

    The pairs of a round are in another order than the parameters, some as (j, i) with the other
    sign of the sine, which gives the same bits: see `_arranged`.
    """

    channel_scales: mx.array
    """float32 (dims,)."""
    pairs: mx.array
    """int32 (krot, dims / 2): i in the low 16 bits, j in the high; both count inside the group."""
    cos: mx.array
    """float32 (krot, dims / 2)."""
    sin: mx.array
    """float32 (krot, dims / 2)."""

    @classmethod
    def build(cls, rounds: Rounds) -> Self:
        """Build the tables from numpy arrays, so that they are evaluated and work in any thread."""
        words = (rounds.first | rounds.second << 16).astype(np.int32)
        arrays = words, rounds.cos, rounds.sin
        if rounds.group_size % (2 * _HALF) == 0:
            arrays = _arranged(*arrays, rounds.group_size)
        return cls(mx.array(rounds.channel_scales), *map(mx.array, arrays))

    @property
    def arrays(self) -> list[mx.array]:
        """List all arrays."""
        return [self.channel_scales, self.pairs, self.cos, self.sin]


def _arranged(
    words: NDArray[np.int32], cos: NDArray[np.float32], sin: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Order the pairs of each round so that two adjacent ones meet in no bank of shared memory.

    The channels i of the pairs 2n and 2n + 1 are in different halves, and their channels j: a pair
    in one half stands beside one in the other, as many as there are, and one of both halves beside
    another of both, turned round.
    """
    pairs = group_size // 2
    in_upper = (words & _HALF) + (words >> 16 & _HALF)  # 0, 1 or 2 halves
    few_bits = in_upper.astype(np.int8).reshape(-1, pairs)
    ordered = np.argsort(few_bits, kind="stable")  # in linear time, as of bytes
    ordered += np.arange(len(ordered))[:, None] * pairs
    places = np.empty_like(ordered)
    places[:, 0::2] = ordered[:, : pairs // 2]
    places[:, 1::2] = ordered[:, : pairs // 2 - 1 : -1]
    places = places.reshape(words.shape)
    words, cos, sin = words.take(places), cos.take(places), sin.take(places)
    turned = words & _HALF != np.arange(words.shape[1]) % 2 * _HALF
    words = np.where(turned, words << 16 | words >> 16, words)
    return words, cos, np.where(turned, -sin, sin)
