"""The rotation through the Metal kernel of the installed `paroquant` package."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from .packed import Form
from .tables import RotationTables

MAX_GROUP_SIZE = 128
MAX_KROT = 16
"""Sizes of the kernel's own arrays, in threadgroup memory and registers."""


def usable(tables: RotationTables) -> bool:
    """Whether the kernel can run this rotation on the default device."""
    return (
        on_metal()
        and tables.group_size <= MAX_GROUP_SIZE
        and tables.krot <= MAX_KROT
        and package_kernel() is not None
    )


def on_metal() -> bool:
    """Whether the default device is a Metal GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@cache
def package_kernel() -> Callable[[int], Any] | None:
    """The package's `get_rotation_kernel`, or None without the package."""
    try:
        from paroquant.kernels.metal import get_rotation_kernel  # optional, only of use on a Mac
    except (ImportError, OSError):  # OSError: a build of the package without the kernel's source
        return None
    kernel: Callable[[int], Any] = get_rotation_kernel
    return kernel


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """`x` scaled and rotated, in its own shape and dtype; only where `usable(tables)`."""
    get_kernel = package_kernel()
    rows = x.reshape(-1, tables.dims)
    count = rows.shape[0]
    if get_kernel is None or count == 0:  # an empty grid is no valid launch
        return x
    form = tables.form(Form)
    tile = 1 if count == 1 else 4  # rows a threadgroup takes; the two that the package itself uses
    threads = tables.group_size // 2  # one for each pair of a group
    sizes = mx.array([count, tables.dims, tables.krot, tables.group_size], dtype=mx.int32)
    (out,) = get_kernel(tile)(
        inputs=[rows, form.pairs, form.cos, form.sin, form.channel_scales, sizes],
        output_shapes=[rows.shape],
        output_dtypes=[rows.dtype],
        grid=(math.ceil(count / tile) * threads, tables.dims // tables.group_size, 1),
        threadgroup=(threads, 1, 1),
    )
    result: mx.array = out.reshape(x.shape)
    return result
