"""The rotation of activations: one chooser over a plain MLX reference and device kernels.

On a row x, first multiplied by `channel_scales`, inside each group of `group_size` channels, for
k = 0 .. krot - 1 and for each pair (i, j) of round k:

    x_i' = x_i cos(theta) + x_j sin(theta)
    x_j' = x_j cos(theta) - x_i sin(theta)

The reference is the truth; each kernel is tested against it and has its own room. A further kernel
is a room with a `Form` (its tables), `usable(tables)` and `rotate(x, tables)`, and its place in
`_KERNELS`.
"""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx

from . import cuda, metal, reference
from .tables import RotationTables

__all__ = ["RotationTables", "prepare", "rotate"]
_KERNELS = (metal, cuda)


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """`x` with its channels scaled and rotated, in the shape and dtype of `x`.

    `x` is (..., dims) in float16, bfloat16 or float32; the arithmetic is float32. The default
    device at the time of the call decides which kernel runs. Raises ValueError when the last axis
    is not `tables.dims` long.
    """
    if x.shape[-1] != tables.dims:
        raise ValueError(f"the rotation is over {tables.dims} channels, x has shape {x.shape}")
    y: mx.array = _kernel_for(tables).rotate(x, tables)
    return y


def prepare(tables: RotationTables) -> None:
    """Builds now what `rotate()` would build at its first call on the default device."""
    tables.form(_kernel_for(tables).Form)


def _kernel_for(tables: RotationTables) -> ModuleType:
    """The room whose kernel runs this rotation on the default device."""
    return next((kernel for kernel in _KERNELS if kernel.usable(tables)), reference)
