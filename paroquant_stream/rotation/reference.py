"""The rotation in plain MLX ops: the truth for every kernel, on CPU, CUDA and Metal.

Each round is y * cos + y[partner] * sin over all channels. The other exact form, the rounds of a
group composed to one group_size x group_size matrix, was slower on the CPU in every shape measured
(tests/benchmarks/micro/rotation.py); its float32 tables take 6 times as much, 3.2 GB for a 70B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .tables import RotationTables, Rounds

CPU_TILE_ROWS = 32
"""Rows per pass on a CPU, to stay in its cache: 512 rows of 8192 take 54 ms, in one pass 164 ms."""


@dataclass(frozen=True)
class Form:
    """Per channel and round a partner and two coefficients: 10 bytes, 80 a channel for krot 8."""

    channel_scales: mx.array
    """float32 (dims,)."""
    partner: tuple[mx.array, ...]
    """krot arrays (dims,): which channel this one is paired with.

    One array a round: a batch of 1 takes a quarter longer if it slices a (krot, dims) table.
    """
    cos: tuple[mx.array, ...]
    """krot float32 arrays (dims, 1)."""
    sin: tuple[mx.array, ...]
    """krot float32 arrays (dims, 1): +sin for i, -sin for j of a pair."""

    @classmethod
    def build(cls, rounds: Rounds) -> Self:
        """These tables, as arrays that need no stream."""
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
        """All of its arrays."""
        return [self.channel_scales, *self.partner, *self.cos, *self.sin]


def _per_round(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    for_first: NDArray[np.generic],
    for_second: NDArray[np.generic],
) -> tuple[mx.array, ...]:
    """One array a round over all channels, from the values for the i and the j of each pair."""
    arrays = []
    for i, j, value_i, value_j in zip(first, second, for_first, for_second, strict=True):
        table = np.empty((2 * len(i), *value_i.shape[1:]), value_i.dtype)
        table[i] = value_i
        table[j] = value_j
        arrays.append(mx.array(table))
    return tuple(arrays)


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """`x` scaled and rotated, in its own shape and dtype."""
    form = tables.form(Form)
    rows = x.reshape(-1, tables.dims)
    count = rows.shape[0]
    if count <= CPU_TILE_ROWS or mx.default_device() != mx.cpu:
        return _rotate_rows(rows, form).reshape(x.shape)
    tiles = [
        _rotate_rows(rows[start : start + CPU_TILE_ROWS], form)
        for start in range(0, count, CPU_TILE_ROWS)
    ]
    return mx.concatenate(tiles).reshape(x.shape)


def _rotate_rows(rows: mx.array, form: Form) -> mx.array:
    """The rotated (n, dims) rows.

    Channels come first inside, so that a gather copies runs of n values: at 64 rows 2.7 times as
    fast as a gather along the last axis.
    """
    y = (rows * form.channel_scales).T  # float32 from here on, as the scales are
    for partner, cos, sin in zip(form.partner, form.cos, form.sin, strict=True):
        y = y * cos + mx.take(y, partner, axis=0) * sin
    return y.T.astype(rows.dtype)
