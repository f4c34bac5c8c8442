"""The rotation in plain MLX operations: the reference that every kernel is tested against.

Each round is y * cos + y[partner] * sin over all channels. Multiplying by the rounds of a group
composed to one group_size x group_size matrix is as exact, but slower on a CPU and needs larger
tables (tests/benchmarks/micro/rotation.py).
"""

from __future__ import annotations

from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .tables import RotationTables, Rounds

CPU_TILE_ROWS = 32
"""Rows per pass on a CPU, so that the intermediate arrays stay in its cache."""


class Tables(NamedTuple):
    """One partner and two coefficients per channel and round: 10 bytes, so 80 for krot 8."""

    channel_scales: mx.array
    """float32 (dims,)."""
    partner: tuple[mx.array, ...]
    """krot arrays (dims,), uint16 or uint32: the channel that each channel is paired with.

    One array per round, since slicing a (krot, dims) table would slow down a batch of 1.
    """
    cos: tuple[mx.array, ...]
    """krot float32 arrays (dims, 1)."""
    sin: tuple[mx.array, ...]
    """krot float32 arrays (dims, 1): +sin for channel i of a pair, -sin for channel j."""

    @classmethod
    def build(cls, rounds: Rounds) -> Self:
        """Build the tables from numpy arrays, so that they are evaluated and work in any thread."""
        first, second = rounds.first + rounds.group_start, rounds.second + rounds.group_start
        dims = rounds.channel_scales.size
        index = np.uint16 if dims <= 1 << 16 else np.uint32
        return cls(
            channel_scales=mx.array(rounds.channel_scales),
            partner=_per_round(first, second, second.astype(index), first.astype(index)),
            cos=_per_round(first, second, rounds.cos[..., None], rounds.cos[..., None]),
            sin=_per_round(first, second, rounds.sin[..., None], -rounds.sin[..., None]),
        )

    @property
    def arrays(self) -> list[mx.array]:
        """List all arrays."""
        return [self.channel_scales, *self.partner, *self.cos, *self.sin]


def _per_round(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    for_first: NDArray[np.generic],
    for_second: NDArray[np.generic],
) -> tuple[mx.array, ...]:
    """Make one array per round over all channels, from the values of each pair's i and j."""
    arrays = []
    for i, j, value_i, value_j in zip(first, second, for_first, for_second, strict=True):
        table = np.empty((2 * len(i), *value_i.shape[1:]), value_i.dtype)
        table[i] = value_i
        table[j] = value_j
        arrays.append(mx.array(table))
    return tuple(arrays)


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """Scale and rotate the channels of `x`, in float32.

    Args:
        x: (..., dims) in float16, bfloat16 or float32.
        tables: Of the rotation.

    Returns:
        An array in the shape and dtype of `x`.
    """
    own = tables.for_kernel(Tables)
    rows = x.reshape(-1, tables.dims)
    count = rows.shape[0]
    if count <= CPU_TILE_ROWS or mx.default_device() != mx.cpu:
        return _rotate_rows(rows, own).reshape(x.shape)
    tiles = [
        _rotate_rows(rows[start : start + CPU_TILE_ROWS], own)
        for start in range(0, count, CPU_TILE_ROWS)
    ]
    return mx.concatenate(tiles).reshape(x.shape)


def _rotate_rows(rows: mx.array, tables: Tables) -> mx.array:
    """Rotate (n, dims) rows."""
    # Transposed, so that a gather copies runs of n values; float32 from here on, as the scales are.
    y = (rows * tables.channel_scales).T
    for partner, cos, sin in zip(tables.partner, tables.cos, tables.sin, strict=True):
        y = y * cos + mx.take(y, partner, axis=0) * sin
    return y.T.astype(rows.dtype)
