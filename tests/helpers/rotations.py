"""Random rotations, and the definition in float64 that results are compared with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paroquant_stream.rotation.tables import RotationTables

BOUNDS = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 1e-6}
"""The largest error of a rotation of each dtype."""


def make_rotation(dims, group_size, krot, seed=0):
    """Make random theta, pairs and channel_scales, as numpy arrays."""
    random = np.random.default_rng(seed)
    groups = dims // group_size
    pairs = [
        np.concatenate([random.permutation(group_size) for _ in range(groups)]) for _ in range(krot)
    ]
    theta = random.uniform(-np.pi, np.pi, (krot, dims // 2))
    channel_scales = random.uniform(0.5, 2.0, (1, dims))
    return theta.astype(np.float16), np.int16(pairs), channel_scales.astype(np.float16)


def rotate_float64(x, theta, pairs, channel_scales, group_size, rounds=None):
    """Rotate x by the definition, pair by pair; `rounds`: the order of the rounds, if another."""
    y = np.array(x, np.float64) * channel_scales.astype(np.float64).reshape(-1)
    angles = theta.astype(np.float64)
    for k in range(len(theta)) if rounds is None else rounds:
        for pair, angle in enumerate(angles[k]):
            start = 2 * pair // group_size * group_size
            i, j = start + int(pairs[k, 2 * pair]), start + int(pairs[k, 2 * pair + 1])
            y_i, y_j = y[..., i].copy(), y[..., j].copy()
            y[..., i] = y_i * np.cos(angle) + y_j * np.sin(angle)
            y[..., j] = y_j * np.cos(angle) - y_i * np.sin(angle)
    return y


def make_x(shape, dtype=mx.float32, seed=1):
    """Make random activations."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32).astype(
        dtype
    )


def to_float64(array):
    """Convert an MLX array to numpy."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def error(y, expected):
    """Compute norm(y - expected) / norm(expected)."""
    found = to_float64(y) if isinstance(y, mx.array) else y
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def tables_of(parameters, group_size):
    """Make the tables of a rotation from numpy arrays."""
    return RotationTables(*(mx.array(values) for values in parameters), group_size)
