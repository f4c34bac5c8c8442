"""The tables of the Metal and CUDA kernels, which rotate the pairs of a round in parallel."""

from __future__ import annotations

from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from .tables import Rounds


class Tables(NamedTuple):
    """One word and two coefficients per pair and round: 12 bytes, so 48 per channel for krot 8."""

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
        return cls(
            channel_scales=mx.array(rounds.channel_scales),
            pairs=mx.array((rounds.first | rounds.second << 16).astype(np.int32)),
            cos=mx.array(rounds.cos),
            sin=mx.array(rounds.sin),
        )

    @property
    def arrays(self) -> list[mx.array]:
        """List all arrays."""
        return [self.channel_scales, self.pairs, self.cos, self.sin]
