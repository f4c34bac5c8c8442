"""The rotation through the Metal kernel of the installed `paroquant` package."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from .packed import Tables
from .tables import RotationTables

MAX_GROUP_SIZE = 128
MAX_KROT = 16
"""The kernel declares its arrays in threadgroup memory and registers with these sizes."""


def usable(tables: RotationTables) -> bool:
    """Return whether the kernel can run this rotation on the default device."""
    return (
        on_metal()
        and tables.group_size <= MAX_GROUP_SIZE
        and tables.krot <= MAX_KROT
        and package_kernel() is not None
    )


def on_metal() -> bool:
    """Return whether the default device is a Metal GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@cache
def package_kernel() -> Callable[[int], Any] | None:
    """Return the `get_rotation_kernel` of `paroquant`, or None if that is not installed."""
    try:
        from paroquant.kernels.metal import get_rotation_kernel  # optional: only a Mac uses it
    except (ImportError, OSError):  # OSError: built without the kernel's source
        return None
    kernel: Callable[[int], Any] = get_rotation_kernel
    return kernel


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """Scale and rotate the channels of `x` on the GPU; requires `usable(tables)`.

    Args:
        x: (..., dims) in float16, bfloat16 or float32.
        tables: Of the rotation.

    Returns:
        An array in the shape and dtype of `x`.
    """
    get_kernel = package_kernel()
    rows = x.reshape(-1, tables.dims)
    count = rows.shape[0]
    if get_kernel is None or count == 0:  # a launch needs a grid that is not empty
        return x
    packed = tables.for_kernel(Tables)
    tile = 1 if count == 1 else 4  # rows per threadgroup: the package uses these two
    threads = tables.group_size // 2  # one per pair of a group
    sizes = mx.array([count, tables.dims, tables.krot, tables.group_size], dtype=mx.int32)
    (out,) = get_kernel(tile)(
        inputs=[rows, packed.pairs, packed.cos, packed.sin, packed.channel_scales, sizes],
        output_shapes=[rows.shape],
        output_dtypes=[rows.dtype],
        grid=(math.ceil(count / tile) * threads, tables.dims // tables.group_size, 1),
        threadgroup=(threads, 1, 1),
    )
    result: mx.array = out.reshape(x.shape)
    return result
