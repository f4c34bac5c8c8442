"""paroquant's rotation on the CPU, so that its models run on any machine."""

from __future__ import annotations

import mlx.core as mx


def rotate_on_the_cpu(x, packed_pairs, cos, sin, scales, dim, krot, group_size):
    """Compute what paroquant's Metal kernel does, so that its model runs on any machine."""
    rows = x.astype(mx.float32) * scales
    offsets = mx.repeat(mx.arange(dim // group_size) * group_size, group_size // 2)
    for k in range(krot):
        i, j = (packed_pairs[k] & 0xFFFF) + offsets, (packed_pairs[k] >> 16) + offsets
        a, b = rows[:, i], rows[:, j]
        rows[:, i] = a * cos[k] + b * sin[k]
        rows[:, j] = b * cos[k] - a * sin[k]
    return rows.astype(x.dtype)
