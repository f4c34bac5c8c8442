"""The tables of kernels that turn the pairs of a round in parallel, on Metal and on CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np

from .tables import Rounds


@dataclass(frozen=True)
class Form:
    """Per pair and round one word and two coefficients: 12 bytes, 48 a channel for krot 8."""

    channel_scales: mx.array
    """float32 (dims,)."""
    pairs: mx.array
    """int32 (krot, dims / 2): i in the low half of the word, j in the high; local to the group."""
    cos: mx.array
    """float32 (krot, dims / 2)."""
    sin: mx.array
    """float32 (krot, dims / 2)."""

    @classmethod
    def build(cls, rounds: Rounds) -> Self:
        """These tables, as arrays that need no stream."""
        return cls(
            channel_scales=mx.array(rounds.channel_scales),
            pairs=mx.array((rounds.first | rounds.second << 16).astype(np.int32)),
            cos=mx.array(rounds.cos),
            sin=mx.array(rounds.sin),
        )

    @property
    def arrays(self) -> list[mx.array]:
        """All of its arrays."""
        return [self.channel_scales, self.pairs, self.cos, self.sin]
